//! Long runs of zeroes, which reach a client of simple replies without having been in a buffer.

mod common;

use std::collections::HashMap;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;

use blockdev::null_disk::NullDisk;
use common::{Answer, HANG, Rig, Wire, memory};
use nbd::protocol::{Headers, PAYLOAD_MAX, command};
use nbd::{Serves, Socket};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;
/// What is not zero: its offset and its byte.
const DATA: [(u64, u8); 4] = [(0, 1), (3 * MIB, 2), (3 * MIB + 100_000, 3), (40 * MIB + 4095, 4)];

fn tcp(rig: &Rig) -> Wire {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    {
        let _runtime = rig.runtime.enter();
        rig.server.listen(Socket::Tcp(listener), Serves::Shared, None).unwrap();
    }
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(HANG)).unwrap();
    Wire::greet(Box::new(stream)).attach("disk", Headers::Simple)
}

fn expected(offset: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    for (at, byte) in DATA.into_iter().filter(|(at, _)| (offset..offset + len).contains(at)) {
        bytes[(at - offset) as usize] = byte;
    }
    bytes
}

#[test]
fn zeroes_and_data_reach_a_client_that_takes_its_time_in_one_piece() {
    let rig = Rig::new(memory(SIZE));
    let mut writer = rig.attach(Headers::Simple);
    for (at, byte) in DATA {
        assert_eq!(writer.write_all(at, &[byte]), Answer::Done);
    }
    let lengths = [1, 4096, (16 << 10) - 1, 16 << 10, 100_000, MIB, 5 * MIB + 1];
    for mut wire in [rig.attach(Headers::Simple), tcp(&rig)] {
        let mut asked = HashMap::new();
        for n in 0..150u64 {
            let len = lengths[n as usize % lengths.len()];
            let offset = (n * 7_340_033) % (SIZE - len);
            asked.insert(wire.request(command::READ, 0, offset, len), (offset, len));
            if n % 10 == 0 {
                wire.request(command::FLUSH, 0, 0, 0);
            }
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
        for _ in 0..165 {
            match (wire.answer(), &mut asked) {
                ((_, Answer::Done), _) => {}
                ((cookie, Answer::Data(data)), asked) => {
                    let (offset, len) = asked.remove(&cookie).unwrap();
                    assert!(data == expected(offset, len), "{len} bytes at {offset}");
                }
                (other, _) => panic!("{other:?}"),
            }
        }
        assert!(asked.is_empty());
        assert!(wire.read(8 * MIB, PAYLOAD_MAX) == Answer::Data(expected(8 * MIB, PAYLOAD_MAX)));
        wire.disconnect();
    }
}

#[test]
fn a_client_that_goes_on_reading_gets_its_last_replies() {
    const REQUESTS: usize = 12;
    let rig = Rig::new(Arc::new(NullDisk::new(SIZE)));
    let mut wire = rig.attach(Headers::Simple);
    for _ in 0..REQUESTS {
        wire.request(command::READ, 0, 0, PAYLOAD_MAX);
    }
    assert_eq!(wire.bytes(1 << 20).len(), 1 << 20);
    // What has not been taken from the socket when the connection is ended is not answered.
    rig.wait_for_requests(REQUESTS as u64);
    assert!(rig.server.disconnect(rig.server.clients()[0].id));
    let rest = REQUESTS * (PAYLOAD_MAX as usize + 16) - (1 << 20);
    for part in 0..rest.div_ceil(1 << 20) {
        std::thread::sleep(std::time::Duration::from_millis(20));
        wire.bytes((rest - (part << 20)).min(1 << 20));
    }
    assert!(wire.is_closed());
}

#[test]
fn zeroes_that_nobody_takes_keep_no_buffers_and_no_connection() {
    let rig = Rig::new(Arc::new(NullDisk::new(SIZE)));
    let mut idle = rig.attach(Headers::Simple);
    for n in 0..100 {
        idle.request(command::READ, 0, n * 4096, PAYLOAD_MAX);
    }
    assert_eq!(idle.bytes(1 << 20).len(), 1 << 20);
    let mut other = rig.attach(Headers::Simple);
    assert_eq!(other.read(0, MIB), Answer::Data(vec![0; MIB as usize]));
    let first = rig.server.clients()[0].id;
    assert!(rig.server.disconnect(first), "its last replies do not fit");
    rig.wait_for_clients(1);
    let mut gone = rig.attach(Headers::Simple);
    for n in 0..100 {
        gone.request(command::READ, 0, n * 4096, MIB);
    }
    drop(gone);
    rig.wait_for_clients(1);
    assert_eq!(other.read(5, MIB), Answer::Data(vec![0; MIB as usize]));
}
