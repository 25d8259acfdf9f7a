//! What one request means: which are refused before they reach the volume, and how extents are told.

use blockdev::{Errno, Extent, ExtentKind, Op};

use crate::protocol::{Headers, PAYLOAD_MAX, RequestHeader, allocation, command, command_flag, error, error_number};

/// The most extents in one reply.
const EXTENTS_MAX: usize = 1 << 12;

/// What was agreed with a client, as far as it decides which requests are valid.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    pub(super) headers: Headers,
    pub(super) allocation_context: bool,
    /// Contexts of the export's own were selected.
    pub(super) own_contexts: bool,
    pub(super) read_only: bool,
    pub(super) fast_zero: bool,
}

/// What to do about a valid request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Action {
    Submit(Op),
    /// Read the range for the sake of caches below.
    Prefetch,
    /// Tell what the export's own contexts say of the range, which the volume is not asked for.
    OwnContexts,
}

/// Checks everything that the volume does not check itself. The error is one of the protocol's numbers.
pub(super) fn check(header: &RequestHeader, rules: &Rules) -> Result<Action, u32> {
    let flags = allowed_flags(header.command, rules).ok_or(error::EINVAL)?;
    if header.flags & !flags != 0 {
        return Err(error::EINVAL);
    }
    if header.flags & command_flag::PAYLOAD_LEN != 0 && header.command != command::WRITE {
        return Err(error::EINVAL);
    }
    let modifies = matches!(header.command, command::WRITE | command::TRIM | command::WRITE_ZEROES);
    if modifies && rules.read_only {
        return Err(error::EPERM);
    }
    let has = |flag: u16| header.flags & flag != 0;
    let fua = has(command_flag::FUA);
    match header.command {
        command::READ if header.len > PAYLOAD_MAX => Err(match rules.headers {
            Headers::Simple => error::EINVAL,
            _ => error::EOVERFLOW,
        }),
        command::WRITE if header.len > PAYLOAD_MAX => Err(error::EINVAL),
        command::FLUSH if header.offset != 0 || header.len != 0 => Err(error::EINVAL),
        command::BLOCK_STATUS if header.len == 0 => Err(error::EINVAL),
        command::BLOCK_STATUS if !rules.allocation_context && !rules.own_contexts => Err(error::EINVAL),
        command::BLOCK_STATUS if !rules.allocation_context => Ok(Action::OwnContexts),
        command::READ => Ok(Action::Submit(Op::Read)),
        command::WRITE => Ok(Action::Submit(Op::Write { fua })),
        command::FLUSH => Ok(Action::Submit(Op::Flush)),
        command::TRIM => Ok(Action::Submit(Op::Discard)),
        command::CACHE => Ok(Action::Prefetch),
        command::WRITE_ZEROES => {
            let (unmap, fast) = (!has(command_flag::NO_HOLE), has(command_flag::FAST_ZERO));
            Ok(Action::Submit(Op::WriteZeroes { unmap, fua, fast }))
        }
        _ => Ok(Action::Submit(Op::BlockStatus)),
    }
}

/// The flags valid with a command; `None` for an unknown command. FUA is valid with every one.
fn allowed_flags(command: u16, rules: &Rules) -> Option<u16> {
    let own = match command {
        command::READ if rules.headers != Headers::Simple => command_flag::DF,
        command::WRITE_ZEROES if rules.fast_zero => command_flag::NO_HOLE | command_flag::FAST_ZERO,
        command::WRITE_ZEROES => command_flag::NO_HOLE,
        command::BLOCK_STATUS => command_flag::REQ_ONE,
        command::READ | command::WRITE | command::FLUSH | command::TRIM | command::CACHE => 0,
        _ => return None,
    };
    let extended = if rules.headers == Headers::Extended { command_flag::PAYLOAD_LEN } else { 0 };
    Some(own | command_flag::FUA | extended)
}

/// The protocol's number for a failed request. Only fast zeroing may be answered with ENOTSUP.
pub(super) fn reply_number(header: &RequestHeader, errno: Errno) -> u32 {
    match error_number(errno) {
        error::ENOTSUP if header.flags & command_flag::FAST_ZERO == 0 => error::EINVAL,
        error::EOVERFLOW => error::EINVAL,
        number => number,
    }
}

/// Extents as they stand in a reply: neighbours of one kind merged, cut to `len` bytes in all, and to one if so wanted.
pub(super) fn encode_extents(extents: &[Extent], len: u64, one: bool, headers: Headers) -> (u32, Vec<u8>) {
    let mut merged: Vec<Extent> = Vec::with_capacity(if one { 1 } else { extents.len().min(EXTENTS_MAX) });
    let mut left = len;
    for extent in extents {
        let full = merged.len() == if one { 1 } else { EXTENTS_MAX };
        let part = extent.len.min(left);
        left -= part;
        match merged.last_mut() {
            _ if part == 0 => continue,
            Some(last) if last.kind == extent.kind => last.len += part,
            _ if full => break,
            _ => merged.push(Extent { len: part, kind: extent.kind }),
        }
    }
    let mut bytes = Vec::with_capacity(merged.len() * 16);
    for extent in &merged {
        let flags = match extent.kind {
            ExtentKind::Data => 0,
            ExtentKind::Zero => allocation::ZERO,
            ExtentKind::Hole => allocation::ZERO | allocation::HOLE,
        };
        if headers == Headers::Extended {
            bytes.extend(extent.len.to_be_bytes());
            bytes.extend(u64::from(flags).to_be_bytes());
        } else {
            bytes.extend((extent.len as u32).to_be_bytes());
            bytes.extend(flags.to_be_bytes());
        }
    }
    (merged.len() as u32, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules =
        Rules { headers: Headers::Structured, allocation_context: true, own_contexts: false, read_only: false, fast_zero: false };

    fn header(command: u16, flags: u16, offset: u64, len: u64) -> RequestHeader {
        RequestHeader { flags, command, cookie: 0, offset, len }
    }

    #[test]
    fn flags_must_fit_the_command() {
        let flags = |command, flags, rules| check(&header(command, flags, 0, 512), rules).is_ok();
        let extended = Rules { headers: Headers::Extended, ..RULES };
        let simple = Rules { headers: Headers::Simple, ..RULES };
        assert!(flags(command::READ, command_flag::DF | command_flag::FUA, &RULES));
        assert!(!flags(command::READ, command_flag::DF, &simple));
        assert!(!flags(command::READ, command_flag::PAYLOAD_LEN, &extended));
        assert!(flags(command::WRITE, command_flag::PAYLOAD_LEN, &extended));
        assert!(flags(command::WRITE, 0, &extended), "QEMU leaves the flag out");
        assert!(!flags(command::WRITE, command_flag::PAYLOAD_LEN, &RULES));
        assert!(!flags(command::WRITE, command_flag::NO_HOLE, &RULES));
        assert!(!flags(command::WRITE_ZEROES, command_flag::FAST_ZERO, &RULES));
        assert!(flags(command::WRITE_ZEROES, command_flag::FAST_ZERO, &Rules { fast_zero: true, ..RULES }));
        assert!(!flags(8, 0, &RULES));
        assert!(!flags(command::FLUSH, 0, &RULES), "a flush has no range");
    }

    #[test]
    fn each_refusal_has_its_number() {
        let read_only = Rules { read_only: true, ..RULES };
        let simple = Rules { headers: Headers::Simple, ..RULES };
        let big = PAYLOAD_MAX + 1;
        assert_eq!(check(&header(command::WRITE, 0, 0, 1), &read_only), Err(error::EPERM));
        assert_eq!(check(&header(command::TRIM, 0, 0, 1), &read_only), Err(error::EPERM));
        assert_eq!(check(&header(command::READ, 0, 0, big), &RULES), Err(error::EOVERFLOW));
        assert_eq!(check(&header(command::READ, 0, 0, big), &simple), Err(error::EINVAL));
        let no_context = Rules { allocation_context: false, ..RULES };
        assert_eq!(check(&header(command::BLOCK_STATUS, 0, 0, 1), &no_context), Err(error::EINVAL));
        let own = Rules { own_contexts: true, ..no_context };
        assert_eq!(check(&header(command::BLOCK_STATUS, 0, 0, 1), &own), Ok(Action::OwnContexts));
        assert_eq!(check(&header(command::BLOCK_STATUS, 0, 0, 0), &own), Err(error::EINVAL));
        let plain_zero = header(command::WRITE_ZEROES, 0, 0, 1);
        assert_eq!(reply_number(&plain_zero, Errno::EOPNOTSUPP), error::EINVAL);
    }

    #[test]
    fn extents_are_merged_and_cut() {
        let extents = [
            Extent { len: 10, kind: ExtentKind::Data },
            Extent { len: 10, kind: ExtentKind::Data },
            Extent { len: 10, kind: ExtentKind::Hole },
            Extent { len: 10, kind: ExtentKind::Zero },
        ];
        let (count, bytes) = encode_extents(&extents, 35, false, Headers::Structured);
        assert_eq!(count, 3);
        assert_eq!(bytes, [0, 0, 0, 20, 0, 0, 0, 0, 0, 0, 0, 10, 0, 0, 0, 3, 0, 0, 0, 5, 0, 0, 0, 2]);
        assert_eq!(encode_extents(&extents, 15, true, Headers::Structured), (1, vec![0, 0, 0, 15, 0, 0, 0, 0]));
        assert_eq!(encode_extents(&extents, 40, true, Headers::Extended).1.len(), 16);
        assert_eq!(encode_extents(&[], 40, false, Headers::Structured).0, 0);
    }
}
