//! The options one by one: what their data means and what is answered.

use crate::protocol::{ALLOCATION_CONTEXT, ALLOCATION_CONTEXT_ID, Headers, STRING_MAX, info, option_reply};

use super::reply::Replies;
use super::{CONTEXTS_MAX, Chosen, Directory, Encryption, Negotiation, Outcome, Refusal, Selected, Violation};

/// Reads fields off the front of an option's data.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn u16(&mut self) -> Option<u16> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u16::from_be_bytes(*bytes))
    }

    fn u32(&mut self) -> Option<u32> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_be_bytes(*bytes))
    }

    /// A string with its length in front.
    fn string(&mut self) -> Option<&'a str> {
        let len = self.u32()? as usize;
        let (bytes, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        string(bytes)
    }
}

/// A string as the protocol allows it.
fn string(bytes: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(bytes).ok()?;
    (text.len() <= STRING_MAX && !text.contains('\0')).then_some(text)
}

struct InfoRequest<'a> {
    name: &'a str,
    wanted: Vec<u16>,
}

fn info_request(data: &[u8]) -> Option<InfoRequest<'_>> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.u16()?;
    let mut wanted = Vec::new();
    for _ in 0..count {
        let kind = fields.u16()?;
        if !wanted.contains(&kind) && kind <= info::BLOCK_SIZE {
            wanted.push(kind);
        }
    }
    fields.0.is_empty().then_some(InfoRequest { name, wanted })
}

struct ContextRequest<'a> {
    name: &'a str,
    queries: Vec<&'a str>,
}

impl ContextRequest<'_> {
    /// Whether the context was asked for by its name.
    fn names(&self, context: &str) -> bool {
        self.queries.contains(&context)
    }

    /// The same, or by the beginning of its name up to a colon, or all contexts were asked for.
    fn covers(&self, context: &str) -> bool {
        let begins = |query: &&str| query.ends_with(':') && context.starts_with(*query);
        self.queries.is_empty() || self.names(context) || self.queries.iter().any(begins)
    }
}

fn context_request(data: &[u8]) -> Option<ContextRequest<'_>> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.u32()?;
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(fields.string().filter(|query| query.contains(':'))?);
    }
    fields.0.is_empty().then_some(ContextRequest { name, queries })
}

fn refuse(replies: &mut Replies<'_>, name: &str, refusal: Refusal) {
    match refusal {
        Refusal::Unknown => {
            replies.error(option_reply::ERR_UNKNOWN, &format!("there is no export {name:?} here"));
        }
        Refusal::Policy(reason) => replies.error(option_reply::ERR_POLICY, &reason),
    }
}

pub(super) fn list<D: Directory>(data: &[u8], replies: &mut Replies<'_>, directory: &D) {
    if !data.is_empty() {
        return replies.error(option_reply::ERR_INVALID, "LIST takes no data");
    }
    directory.list(&mut |name, description| replies.server(name, description));
    replies.ack();
}

impl Negotiation {
    pub(super) fn export_name<D: Directory>(
        &self,
        data: &[u8],
        output: &mut Vec<u8>,
        directory: &D,
    ) -> Result<Outcome<D::Export>, Violation> {
        let violation =
            |reason: &str| Violation::ExportName { name: String::from_utf8_lossy(data).into_owned(), reason: reason.to_owned() };
        if self.encryption == Encryption::Required {
            return Err(violation("this listener speaks TLS only"));
        }
        if self.headers == Headers::Extended {
            return Err(violation("extended headers need the option GO"));
        }
        let name = string(data).ok_or_else(|| violation("not a valid name"))?;
        let (export, description) = directory.find(name).map_err(|refusal| match refusal {
            Refusal::Unknown => violation("there is no such export"),
            Refusal::Policy(reason) => violation(&reason),
        })?;
        let mut replies = Replies::new(output, crate::protocol::option::EXPORT_NAME);
        replies.export_name(description.size, self.flags_of(&description), !self.no_zeroes);
        Ok(Outcome::Chosen(self.chosen(export, description)))
    }

    /// Answers INFO and GO; `Some` if the answer is positive.
    pub(super) fn info<D: Directory>(&self, data: &[u8], replies: &mut Replies<'_>, directory: &D) -> Option<Chosen<D::Export>> {
        let Some(request) = info_request(data) else {
            replies.error(option_reply::ERR_INVALID, "malformed request for an export");
            return None;
        };
        match directory.find(request.name) {
            Ok((export, description)) => {
                let flags = self.flags_of(&description);
                replies.info(info::EXPORT, &description, flags);
                for kind in request.wanted.iter().filter(|kind| **kind != info::EXPORT) {
                    replies.info(*kind, &description, flags);
                }
                replies.ack();
                Some(self.chosen(export, description))
            }
            Err(refusal) => {
                refuse(replies, request.name, refusal);
                None
            }
        }
    }

    pub(super) fn structured_reply(&mut self, data: &[u8], replies: &mut Replies<'_>) {
        match self.headers {
            _ if !data.is_empty() => replies.error(option_reply::ERR_INVALID, "STRUCTURED_REPLY takes no data"),
            Headers::Extended => {
                replies.error(option_reply::ERR_EXT_HEADER_REQD, "extended headers are already in use");
            }
            Headers::Structured => {
                replies.error(option_reply::ERR_INVALID, "structured replies are already in use");
            }
            Headers::Simple => {
                self.headers = Headers::Structured;
                replies.ack();
            }
        }
    }

    pub(super) fn extended_headers(&mut self, data: &[u8], replies: &mut Replies<'_>) {
        match self.headers {
            _ if !data.is_empty() => replies.error(option_reply::ERR_INVALID, "EXTENDED_HEADERS takes no data"),
            Headers::Extended => {
                replies.error(option_reply::ERR_INVALID, "extended headers are already in use");
            }
            _ => {
                self.headers = Headers::Extended;
                replies.ack();
            }
        }
    }

    pub(super) fn list_contexts<D: Directory>(&self, data: &[u8], replies: &mut Replies<'_>, directory: &D) {
        let Some((request, export, _)) = self.find_for_contexts(data, replies, directory) else { return };
        let own = directory.contexts(&export);
        let offered = std::iter::once(ALLOCATION_CONTEXT).chain(own.iter().map(String::as_str));
        offered.filter(|context| request.covers(context)).for_each(|context| replies.context(0, context));
        replies.ack();
    }

    pub(super) fn set_contexts<D: Directory>(&mut self, data: &[u8], replies: &mut Replies<'_>, directory: &D) {
        self.selected = None;
        let Some((request, export, canonical)) = self.find_for_contexts(data, replies, directory) else { return };
        let is_own = |query: &&str| *query != ALLOCATION_CONTEXT;
        let offered = if request.queries.iter().any(is_own) { directory.contexts(&export) } else { Vec::new() };
        let numbered = (ALLOCATION_CONTEXT_ID + 1..).zip(offered);
        let own: Vec<(u32, String)> = numbered.filter(|(_, context)| request.names(context)).collect();
        if own.len() > CONTEXTS_MAX {
            return replies.error(option_reply::ERR_TOO_BIG, "too many metadata contexts at once");
        }
        let allocation = request.names(ALLOCATION_CONTEXT);
        if allocation {
            replies.context(ALLOCATION_CONTEXT_ID, ALLOCATION_CONTEXT);
        }
        own.iter().for_each(|(id, context)| replies.context(*id, context));
        replies.ack();
        self.selected = Some(Selected { export: canonical, allocation, own });
    }

    /// Checks a request about metadata contexts; answers it itself if it must be refused.
    fn find_for_contexts<'a, D: Directory>(
        &self,
        data: &'a [u8],
        replies: &mut Replies<'_>,
        directory: &D,
    ) -> Option<(ContextRequest<'a>, D::Export, String)> {
        if self.headers == Headers::Simple {
            replies.error(option_reply::ERR_INVALID, "metadata contexts need structured replies");
            return None;
        }
        let Some(request) = context_request(data) else {
            replies.error(option_reply::ERR_INVALID, "malformed request for metadata contexts");
            return None;
        };
        match directory.find(request.name) {
            Ok((export, description)) => Some((request, export, description.name)),
            Err(refusal) => {
                refuse(replies, request.name, refusal);
                None
            }
        }
    }
}
