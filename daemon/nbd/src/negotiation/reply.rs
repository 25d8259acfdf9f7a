//! Replies to one option, appended to the output.

use crate::protocol::{OPTION_REPLY_MAGIC, PAYLOAD_MAX, info, option_reply};

use super::Description;

pub(super) struct Replies<'a> {
    output: &'a mut Vec<u8>,
    option: u32,
}

impl<'a> Replies<'a> {
    pub(super) fn new(output: &'a mut Vec<u8>, option: u32) -> Replies<'a> {
        Replies { output, option }
    }

    fn reply(&mut self, kind: u32, parts: &[&[u8]]) {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        self.output.extend(OPTION_REPLY_MAGIC.to_be_bytes());
        self.output.extend(self.option.to_be_bytes());
        self.output.extend(kind.to_be_bytes());
        self.output.extend((len as u32).to_be_bytes());
        for part in parts {
            self.output.extend_from_slice(part);
        }
    }

    pub(super) fn ack(&mut self) {
        self.reply(option_reply::ACK, &[]);
    }

    /// `message` is for people.
    pub(super) fn error(&mut self, kind: u32, message: &str) {
        self.reply(kind, &[message.as_bytes()]);
    }

    pub(super) fn server(&mut self, name: &str, description: &str) {
        let len = (name.len() as u32).to_be_bytes();
        self.reply(option_reply::SERVER, &[&len, name.as_bytes(), description.as_bytes()]);
    }

    pub(super) fn context(&mut self, id: u32, name: &str) {
        self.reply(option_reply::META_CONTEXT, &[&id.to_be_bytes(), name.as_bytes()]);
    }

    /// One piece of information; kinds not known here are left out.
    pub(super) fn info(&mut self, kind: u16, description: &Description, flags: u16) {
        let designator = kind.to_be_bytes();
        match kind {
            info::EXPORT => {
                let (size, flags) = (description.size.to_be_bytes(), flags.to_be_bytes());
                self.reply(option_reply::INFO, &[&designator, &size, &flags]);
            }
            info::NAME => self.reply(option_reply::INFO, &[&designator, description.name.as_bytes()]),
            info::DESCRIPTION if !description.description.is_empty() => {
                self.reply(option_reply::INFO, &[&designator, description.description.as_bytes()]);
            }
            info::BLOCK_SIZE => {
                let sizes = [1, description.preferred_size, PAYLOAD_MAX as u32].map(u32::to_be_bytes);
                self.reply(option_reply::INFO, &[&designator, &sizes[0], &sizes[1], &sizes[2]]);
            }
            _ => {}
        }
    }

    /// The old reply to EXPORT_NAME, which has no header.
    pub(super) fn export_name(&mut self, size: u64, flags: u16, zeroes: bool) {
        self.output.extend(size.to_be_bytes());
        self.output.extend(flags.to_be_bytes());
        if zeroes {
            self.output.extend([0; 124]);
        }
    }
}
