//! The handshake phase as a state machine without I/O: bytes in, bytes and an [`Outcome`] out.
//!
//! ```text
//!  greeting ──▶ client flags ──▶ option ◀──────────┐
//!                                  ├─ answered ────┤
//!                                  ├─ STARTTLS ────┘ all that was negotiated before is forgotten
//!                                  ├─ GO, EXPORT_NAME ──▶ transmission
//!                                  └─ ABORT, violation ──▶ closed
//! ```
//!
//! Invariants: one call handles at most one option, so that its reply can be sent before the next is looked at; what a client can
//! make the server remember or say is bounded by the limits below; a client that must use TLS learns nothing before it does.

mod options;
mod reply;

use thiserror::Error;

use crate::protocol::{
    Headers, OPTION_MAGIC, SERVER_MAGIC, client_flag, handshake_flag, option, option_reply, transmission_flag,
};
use reply::Replies;

/// The longest option that is looked at; longer ones are skipped and refused.
const OPTION_MAX: usize = 16 << 10;
/// A client that announces an option longer than this is cut off.
const OPTION_SKIP_MAX: u32 = 1 << 20;
/// The most metadata contexts of an export's own that one client may use.
const CONTEXTS_MAX: usize = 16;
/// The most options of one client.
const OPTIONS_MAX: u32 = 4096;
const OPTION_HEADER: usize = 16;

/// Who knows the exports during negotiation.
pub trait Directory {
    /// What the server keeps of a chosen export.
    type Export;
    /// Calls `visit` with name and description of each export the client may see.
    fn list(&self, visit: &mut dyn FnMut(&str, &str));
    /// Looks an export up; the empty name asks for the default one.
    fn find(&self, name: &str) -> Result<(Self::Export, Description), Refusal>;
    /// The metadata contexts that an export has beside [`crate::protocol::ALLOCATION_CONTEXT`].
    fn contexts(&self, _export: &Self::Export) -> Vec<String> {
        Vec::new()
    }
}

/// What a client is told of an export.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Description {
    /// The canonical name.
    pub name: String,
    pub description: String,
    /// In bytes.
    pub size: u64,
    /// Of [`transmission_flag`], without those that depend on the negotiation.
    pub flags: u16,
    /// In bytes, a power of two of at least 512.
    pub preferred_size: u32,
}

/// Why a client does not get an export.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refusal {
    Unknown,
    /// It exists, but this client may not use it, with the reason.
    Policy(String),
}

/// What a listener wants of its clients.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Encryption {
    /// There is no TLS.
    Off,
    /// Nothing is answered before TLS.
    Required,
    /// TLS is up.
    Established,
}

/// What a client settled on.
#[derive(Debug)]
pub struct Chosen<E> {
    pub export: E,
    pub name: String,
    pub headers: Headers,
    /// BLOCK_STATUS tells what is allocated.
    pub allocation_context: bool,
    /// The export's own contexts that BLOCK_STATUS tells of, with their identifiers.
    pub contexts: Vec<(u32, String)>,
}

/// What a client selected.
#[derive(Debug)]
struct Selected {
    /// The canonical name of the export.
    export: String,
    allocation: bool,
    own: Vec<(u32, String)>,
}

/// What happened in one step.
#[derive(Debug)]
pub enum Outcome<E> {
    /// Nothing more can be done without more input.
    NeedsInput,
    /// Something was handled; send the output, then go on.
    Continue,
    /// Send the output, then begin TLS and call [`Negotiation::tls_established`].
    StartTls,
    /// Send the output; the transmission phase begins with the next byte of input.
    Chosen(Chosen<E>),
    /// Send the output and close.
    Aborted,
}

/// Why a client is cut off without a reply.
#[derive(Error, Debug, PartialEq, Eq)]
pub enum Violation {
    #[error("client flags {0:#x} are not known here")]
    ClientFlags(u32),
    #[error("an option begins with {0:#x}, not with the protocol's magic number")]
    OptionMagic(u64),
    #[error("an option of {0} bytes")]
    OptionTooLong(u32),
    #[error("more than {OPTIONS_MAX} options")]
    TooManyOptions,
    #[error("export {name:?} was asked for in the old way, which cannot be refused otherwise: {reason}")]
    ExportName { name: String, reason: String },
}

/// The state of one client's negotiation.
pub struct Negotiation {
    encryption: Encryption,
    phase: Phase,
    fixed_newstyle: bool,
    no_zeroes: bool,
    options: u32,
    headers: Headers,
    selected: Option<Selected>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    ClientFlags,
    Options,
    Skipping { option: u32, remaining: u32 },
}

impl Negotiation {
    pub fn new(encryption: Encryption) -> Negotiation {
        Negotiation {
            encryption,
            phase: Phase::ClientFlags,
            fixed_newstyle: false,
            no_zeroes: false,
            options: 0,
            headers: Headers::Simple,
            selected: None,
        }
    }

    /// What the server says first.
    pub fn greeting() -> [u8; 18] {
        let mut bytes = [0; 18];
        bytes[..8].copy_from_slice(&SERVER_MAGIC.to_be_bytes());
        bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        let flags = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
        bytes[16..].copy_from_slice(&flags.to_be_bytes());
        bytes
    }

    /// To be called after [`Outcome::StartTls`] when TLS is up. Input received before it must have been thrown away.
    pub fn tls_established(&mut self) {
        self.encryption = Encryption::Established;
        self.headers = Headers::Simple;
        self.selected = None;
    }

    /// Handles at most one message at the start of `input`. Returns how many bytes it took and what came of it.
    pub fn advance<D: Directory>(
        &mut self,
        input: &[u8],
        output: &mut Vec<u8>,
        directory: &D,
    ) -> Result<(usize, Outcome<D::Export>), Violation> {
        match self.phase {
            Phase::ClientFlags => self.client_flags(input),
            Phase::Options => self.option(input, output, directory),
            Phase::Skipping { option, remaining } => {
                let taken = input.len().min(remaining as usize);
                let remaining = remaining - taken as u32;
                if remaining > 0 {
                    self.phase = Phase::Skipping { option, remaining };
                    return Ok((taken, Outcome::NeedsInput));
                }
                self.phase = Phase::Options;
                Replies::new(output, option).error(option_reply::ERR_TOO_BIG, "the option is too long");
                Ok((taken, Outcome::Continue))
            }
        }
    }

    fn client_flags<E>(&mut self, input: &[u8]) -> Result<(usize, Outcome<E>), Violation> {
        let Some(bytes) = input.first_chunk::<4>() else { return Ok((0, Outcome::NeedsInput)) };
        let flags = u32::from_be_bytes(*bytes);
        if flags & !(client_flag::FIXED_NEWSTYLE | client_flag::NO_ZEROES) != 0 {
            return Err(Violation::ClientFlags(flags));
        }
        self.fixed_newstyle = flags & client_flag::FIXED_NEWSTYLE != 0;
        self.no_zeroes = flags & client_flag::NO_ZEROES != 0;
        self.phase = Phase::Options;
        Ok((bytes.len(), Outcome::Continue))
    }

    fn option<D: Directory>(
        &mut self,
        input: &[u8],
        output: &mut Vec<u8>,
        directory: &D,
    ) -> Result<(usize, Outcome<D::Export>), Violation> {
        let Some((header, rest)) = input.split_first_chunk::<OPTION_HEADER>() else {
            return Ok((0, Outcome::NeedsInput));
        };
        let [magic @ .., _, _, _, _, _, _, _, _] = *header;
        let [.., o0, o1, o2, o3, l0, l1, l2, l3] = *header;
        let magic = u64::from_be_bytes(magic);
        if magic != OPTION_MAGIC {
            return Err(Violation::OptionMagic(magic));
        }
        let (option, len) = (u32::from_be_bytes([o0, o1, o2, o3]), u32::from_be_bytes([l0, l1, l2, l3]));
        if len > OPTION_SKIP_MAX || (len as usize > OPTION_MAX && option == option::EXPORT_NAME) {
            return Err(Violation::OptionTooLong(len));
        }
        if len as usize <= OPTION_MAX && rest.len() < len as usize {
            return Ok((0, Outcome::NeedsInput));
        }
        self.options += 1;
        if self.options > OPTIONS_MAX {
            return Err(Violation::TooManyOptions);
        }
        if len as usize > OPTION_MAX {
            self.phase = Phase::Skipping { option, remaining: len };
            return Ok((OPTION_HEADER, Outcome::Continue));
        }
        let data = &rest[..len as usize];
        let outcome = self.dispatch(option, data, output, directory)?;
        Ok((OPTION_HEADER + data.len(), outcome))
    }

    fn dispatch<D: Directory>(
        &mut self,
        option: u32,
        data: &[u8],
        output: &mut Vec<u8>,
        directory: &D,
    ) -> Result<Outcome<D::Export>, Violation> {
        if option == option::EXPORT_NAME {
            return self.export_name(data, output, directory);
        }
        let mut replies = Replies::new(output, option);
        match option {
            option::ABORT => {
                replies.ack();
                return Ok(Outcome::Aborted);
            }
            option::STARTTLS => return Ok(self.start_tls(data, &mut replies)),
            _ if self.encryption == Encryption::Required => {
                replies.error(option_reply::ERR_TLS_REQD, "this server speaks TLS only");
            }
            option::LIST => options::list(data, &mut replies, directory),
            option::INFO => drop(self.info(data, &mut replies, directory)),
            option::GO => {
                if let Some(chosen) = self.info(data, &mut replies, directory) {
                    return Ok(Outcome::Chosen(chosen));
                }
            }
            option::STRUCTURED_REPLY => self.structured_reply(data, &mut replies),
            option::EXTENDED_HEADERS => self.extended_headers(data, &mut replies),
            option::LIST_META_CONTEXT => self.list_contexts(data, &mut replies, directory),
            option::SET_META_CONTEXT => self.set_contexts(data, &mut replies, directory),
            _ => replies.error(option_reply::ERR_UNSUP, "unknown option"),
        }
        Ok(Outcome::Continue)
    }

    fn start_tls<E>(&self, data: &[u8], replies: &mut Replies<'_>) -> Outcome<E> {
        match self.encryption {
            _ if !data.is_empty() => replies.error(option_reply::ERR_INVALID, "STARTTLS takes no data"),
            Encryption::Off => replies.error(option_reply::ERR_POLICY, "TLS is not configured on this listener"),
            Encryption::Established => replies.error(option_reply::ERR_INVALID, "TLS is already in use"),
            Encryption::Required if !self.fixed_newstyle => {
                replies.error(option_reply::ERR_POLICY, "TLS needs the fixed newstyle handshake");
            }
            Encryption::Required => {
                replies.ack();
                return Outcome::StartTls;
            }
        }
        Outcome::Continue
    }

    fn flags_of(&self, description: &Description) -> u16 {
        let fragments = self.headers != Headers::Simple;
        description.flags | transmission_flag::HAS_FLAGS | if fragments { transmission_flag::SEND_DF } else { 0 }
    }

    fn chosen<E>(&self, export: E, description: Description) -> Chosen<E> {
        let selected = self.selected.as_ref().filter(|selected| selected.export == description.name);
        Chosen {
            export,
            name: description.name,
            headers: self.headers,
            allocation_context: selected.is_some_and(|selected| selected.allocation),
            contexts: selected.map(|selected| selected.own.clone()).unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests;
