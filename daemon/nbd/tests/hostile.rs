//! Garbage, half messages and rude clients: the server drops them and goes on serving the others.

mod common;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::{Answer, HANG, Rig, Wire, memory};
use nbd::protocol::{Headers, REQUEST_MAGIC, command, option, option_reply};
use nbd::{Export, ListenError, ServerOptions, Serves, Socket};
use proptest::prelude::*;

fn still_serves(rig: &Rig) {
    let mut wire = rig.attach(Headers::Structured);
    assert_eq!(wire.write_all(0, b"alive"), Answer::Done);
    assert_eq!(wire.read(0, 5), Answer::Data(b"alive".to_vec()));
    wire.disconnect();
}

/// Two clients of opposite manners at the same export.
#[test]
fn garbage_at_every_stage_ends_that_client_alone() {
    let rig = Rig::new(memory(1 << 20));
    let mut good = rig.attach(Headers::Simple);
    let garbage = vec![0xa5; 1000];
    let stages: [fn(&Rig) -> Wire; 4] = [
        |rig| {
            let stream = UnixStream::connect(&rig.socket).unwrap();
            stream.set_read_timeout(Some(HANG)).unwrap();
            Wire::over(Box::new(stream))
        },
        |rig| Wire::connect(&rig.socket),
        |rig| rig.attach(Headers::Simple),
        |rig| rig.attach(Headers::Extended),
    ];
    for stage in stages {
        let mut wire = stage(&rig);
        wire.send(&garbage);
        assert!(wire.is_closed());
        assert_eq!(good.read(0, 1), Answer::Data(vec![0]));
    }
    rig.wait_for_clients(1);
}

#[test]
fn clients_that_leave_in_the_middle_of_anything_leave_nothing_behind() {
    let rig = Rig::new(memory(1 << 20));
    for cut in [0, 3, 4, 10, 20, 25, 40] {
        let mut stream = UnixStream::connect(&rig.socket).unwrap();
        let words = [&3u32.to_be_bytes()[..], &Wire::option_bytes(option::GO, &Wire::go_data("disk"))].concat();
        stream.write_all(&words[..cut.min(words.len())]).unwrap();
    }
    for cut in [0, 5, 28, 29, 5000, 90_000] {
        let mut wire = rig.attach(Headers::Structured);
        let (_, mut bytes) = wire.header(command::WRITE, 0, 0, 100_000);
        bytes.extend(vec![1; 100_000]);
        wire.send(&bytes[..cut]);
    }
    rig.wait_for_clients(0);
    still_serves(&rig);
}

#[test]
fn requests_with_the_wrong_kind_of_header_end_the_connection() {
    let rig = Rig::new(memory(1 << 20));
    let mut wire = rig.attach(Headers::Extended);
    wire.headers = Headers::Simple;
    wire.request(command::READ, 0, 0, 512);
    wire.send(&[0; 4]);
    assert!(wire.is_closed());
    still_serves(&rig);
}

#[test]
fn a_handshake_that_takes_too_long_is_ended_and_makes_room() {
    let options = ServerOptions { handshake_time_max: Duration::from_millis(300), handshakes_max: 2, ..Default::default() };
    let rig = Rig::with(memory(1 << 20), 1, options, |export| export);
    let mut idlers: Vec<Wire> = (0..2).map(|_| Wire::connect(&rig.socket)).collect();
    still_serves(&rig);
    for idler in &mut idlers {
        assert!(idler.is_closed());
    }
}

#[test]
fn who_never_chooses_an_export_has_to_go_for_others() {
    let options = ServerOptions { handshake_time_max: Duration::from_secs(3600), handshakes_max: 2, ..Default::default() };
    let rig = Rig::with(memory(1 << 20), 1, options, |export| export);
    let mut idlers: Vec<Wire> = (0..2).map(|_| Wire::connect(&rig.socket)).collect();
    still_serves(&rig);
    assert!(idlers[0].is_closed(), "the oldest went");
}

#[test]
fn more_clients_than_allowed_are_closed() {
    let options = ServerOptions { clients_max: 2, ..Default::default() };
    let rig = Rig::with(memory(1 << 20), 1, options, |export| export);
    let _two = [rig.attach(Headers::Simple), rig.attach(Headers::Simple)];
    assert!(rig.attach(Headers::Simple).is_closed());
}

#[test]
fn tcp_beyond_this_host_needs_tls() {
    let rig = Rig::new(memory(1 << 20));
    let _runtime = rig.runtime.enter();
    let everywhere = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let refused = rig.server.listen(Socket::Tcp(everywhere), Serves::Shared, None);
    assert!(matches!(refused, Err(ListenError::NeedsTls(_))));
    let local = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = local.local_addr().unwrap();
    rig.server.listen(Socket::Tcp(local), Serves::Shared, None).unwrap();
    let stream = std::net::TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(HANG)).unwrap();
    let mut wire = Wire::greet(Box::new(stream)).attach("", Headers::Structured);
    let data: Vec<u8> = (0..700_000u32).map(|at| (at >> 8) as u8).collect();
    assert_eq!(wire.write_all(100, &data), Answer::Done);
    assert_eq!(wire.read(100, 700_000), Answer::Data(data));
}

#[test]
fn a_listener_of_its_own_serves_one_export_only() {
    let rig = Rig::new(memory(1 << 20));
    let own = std::sync::Arc::new(Export::new("own", common::volume(memory(4096))));
    let path = rig.listen_unix("own.sock", Serves::Only(own.clone()), None);
    let mut wire = Wire::connect(&path);
    let listed = wire.option(option::LIST, &[]);
    assert_eq!(listed[0].1, b"\0\0\0\x03own");
    assert_eq!(listed.len(), 2);
    assert_eq!(wire.option(option::INFO, &Wire::go_data("disk"))[0].0, option_reply::ERR_UNKNOWN);
    let mut wire = wire.attach("", Headers::Simple);
    assert_eq!(wire.read(0, 4), Answer::Data(vec![0; 4]));
    assert!(rig.server.publish(&std::sync::Arc::new(Export::new("disk", common::volume(memory(1))))).is_err());
    rig.runtime.block_on(rig.server.withdraw(&own));
    assert!(wire.is_closed());
    assert!(UnixStream::connect(&path).is_err());
}

#[test]
fn a_thousand_idle_clients_are_cheap() {
    let rig = Rig::new(memory(1 << 20));
    let clients: Vec<Wire> = (0..1000).map(|_| rig.attach(Headers::Structured)).collect();
    rig.wait_for_clients(1000);
    let each = rig.buffers_used() / clients.len();
    assert!(each <= 4096, "{each} bytes of buffers for an idle client");
    still_serves(&rig);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// Whatever follows a good handshake, the server ends that client or answers it, and serves the next.
    #[test]
    fn any_bytes_are_survived(
        extended: bool,
        requests in proptest::collection::vec(
            (0u16..10, 0u16..64, prop_oneof![0u64..2_000_000, any::<u64>()], prop_oneof![0u64..100_000, any::<u64>()]), 0..20),
        tail in proptest::collection::vec(any::<u8>(), 0..200),
        true_magic: bool,
    ) {
        let rig = Rig::with(memory(1 << 20), 1, ServerOptions::default(), |export| export);
        let mut wire = rig.attach(if extended { Headers::Extended } else { Headers::Structured });
        let mut bytes = Vec::new();
        for (command, flags, offset, len) in requests {
            bytes.extend(wire.header(command, flags, offset, len).1);
        }
        if true_magic {
            bytes.extend(REQUEST_MAGIC.to_be_bytes());
        }
        bytes.extend(tail);
        let _ = wire.stream.write_all(&bytes);
        drop(wire);
        rig.wait_for_clients(0);
        still_serves(&rig);
    }
}
