//! Metadata contexts of an export's own, on the wire.

mod common;

use std::ops::Range;
use std::sync::Arc;

use common::{Answer, Rig, Wire, memory};
use nbd::protocol::{ALLOCATION_CONTEXT, Headers, allocation, command, command_flag, error, option, option_reply};
use nbd::{Contexts, ServerOptions};

const SIZE: u64 = 1 << 20;
const HOLE: u64 = (allocation::HOLE | allocation::ZERO) as u64;

struct Marks;

impl Contexts for Marks {
    fn names(&self) -> Vec<String> {
        ["x:first", "x:second", "x:away"].map(str::to_owned).to_vec()
    }

    fn marked(&self, name: &str) -> Result<Vec<Range<u64>>, String> {
        match name {
            "x:first" => Ok(vec![4096..8192, SIZE..u64::MAX]),
            "x:second" => Ok(std::iter::once(0..512).collect()),
            _ => Err("the pool is away".to_owned()),
        }
    }
}

fn attach(rig: &Rig, headers: Headers, contexts: &[&str]) -> Wire {
    let mut wire = Wire::connect(&rig.socket);
    let how = if headers == Headers::Extended { option::EXTENDED_HEADERS } else { option::STRUCTURED_REPLY };
    let data = Wire::contexts_data("disk", contexts);
    for (option, data) in [(how, &[][..]), (option::SET_META_CONTEXT, &data), (option::GO, &Wire::go_data("disk"))] {
        assert_eq!(wire.option(option, data).last().unwrap().0, option_reply::ACK);
    }
    wire.headers = headers;
    wire
}

fn rig() -> Rig {
    Rig::with(memory(SIZE), 1, ServerOptions::default(), |export| export.contexts(Arc::new(Marks)))
}

#[test]
fn block_status_answers_with_a_chunk_for_each_selected_context() {
    let rig = rig();
    for headers in [Headers::Structured, Headers::Extended] {
        let mut wire = attach(&rig, headers, &["x:second", ALLOCATION_CONTEXT, "x:first"]);
        let cookie = wire.request(command::BLOCK_STATUS, 0, 0, 16384);
        let expected = [(1, vec![(16384, HOLE)]), (2, vec![(4096, 0), (4096, 1), (8192, 0)]), (3, vec![(512, 1), (15872, 0)])];
        assert_eq!(wire.context_extents(cookie), expected, "{headers:?}");
        let cookie = wire.request(command::BLOCK_STATUS, command_flag::REQ_ONE, 100, 8000);
        let expected = [(1, vec![(8000, HOLE)]), (2, vec![(3996, 0)]), (3, vec![(412, 1)])];
        assert_eq!(wire.context_extents(cookie), expected, "{headers:?}");
        wire.disconnect();
    }
}

#[test]
fn an_own_context_alone_is_answered_without_the_volume_and_within_its_size() {
    let rig = rig();
    let mut wire = attach(&rig, Headers::Structured, &["x:first"]);
    let cookie = wire.request(command::BLOCK_STATUS, 0, 4096, SIZE - 4096);
    assert_eq!(wire.context_extents(cookie), [(2, vec![(4096, 1), (SIZE - 8192, 0)])]);
    for (offset, len) in [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 2), (0, 0)] {
        assert_eq!(wire.ask(command::BLOCK_STATUS, 0, offset, len), Answer::Error(error::EINVAL), "{offset} {len}");
    }
    // Many at once, each with all that a reply may have.
    let cookies: Vec<u64> = (0..200).map(|_| wire.request(command::BLOCK_STATUS, 0, 0, 8192)).collect();
    for cookie in cookies {
        assert_eq!(wire.context_extents(cookie), [(2, vec![(4096, 0), (4096, 1)])]);
    }
    wire.disconnect();
}

#[test]
fn a_context_that_cannot_be_found_out_is_an_error_for_its_questions_only() {
    let rig = rig();
    let mut wire = attach(&rig, Headers::Structured, &["x:away", "x:first"]);
    assert_eq!(wire.ask(command::BLOCK_STATUS, 0, 0, 4096), Answer::Error(error::EIO));
    assert_eq!(wire.read(0, 512), Answer::Data(vec![0; 512]));
    wire.disconnect();
}
