//! Messages of a front end: the input is a stream of bytes as it comes out of the socket. The first byte of each message decides
//! how many descriptors come with it.

#![no_main]

use std::fs::File;
use std::os::fd::OwnedFd;

use libfuzzer_sys::fuzz_target;
use vhost_user_blk::message::{HEADER_LEN, Header, Message};

fuzz_target!(|input: &[u8]| {
    let Some((&[count], mut rest)) = input.split_first_chunk() else { return };
    while let Some((bytes, after)) = rest.split_first_chunk::<HEADER_LEN>() {
        let Ok(header) = Header::parse(bytes) else { return };
        let Some((payload, next)) = after.split_at_checked(header.size as usize) else { return };
        let file = || OwnedFd::from(File::open("/dev/null").expect("/dev/null"));
        let fds = (0..count % 4).map(|_| file()).collect();
        if let Ok(Message::SetMemTable(regions)) = Message::parse(header, payload, fds) {
            assert!(regions.iter().all(|(spec, _)| spec.guest.checked_add(spec.size).is_some()));
        }
        rest = next;
    }
});
