//! Requests and what comes of them.

use std::sync::Arc;

use blockdev::memory_disk::MemoryDisk;
use blockdev::stats::OpClass;
use vhost_user_blk::ExportOptions;

use crate::frontend::*;
use crate::{DISK, Server};

fn started(server: &Server) -> (Frontend, Queue) {
    let frontend = Frontend::connect(&server.socket());
    let queue = Queue::new(0, 64);
    frontend.start(&queue, 0);
    (frontend, queue)
}

#[test]
fn what_is_written_is_read() {
    let server = Server::start();
    let (frontend, mut queue) = started(&server);
    let bytes: Vec<u8> = (0..4096u32).map(|at| (at * 7) as u8).collect();
    assert_eq!(queue.run(&frontend.memory, T_OUT, 8, Data::Out(&bytes)), 0);
    assert_eq!(queue.run(&frontend.memory, T_FLUSH, 0, Data::None), 0);
    queue.write_request(&frontend.memory, 3, T_IN, 8, Data::In(4096));
    queue.offer(&frontend.memory, 3);
    queue.kick();
    assert_eq!(queue.wait_used(&frontend.memory), (3, 4097));
    assert_eq!(queue.status(&frontend.memory, 3), 0);
    assert_eq!(queue.read_data(&frontend.memory, 3, 4096), bytes);
    let stats = server.export.stats();
    assert_eq!((stats.class(OpClass::Read).ended, stats.class(OpClass::Write).bytes), (1, 4096));
}

#[test]
fn every_kind_of_request_is_answered() {
    let server = Server::start();
    let (frontend, mut queue) = started(&server);
    let memory = &frontend.memory;
    let range = |sector: u64, sectors: u32, flags: u32| {
        [sector.to_le_bytes().as_slice(), &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    let last = DISK / 512;
    let mut status = |kind, sector, data: Data<'_>| queue.run(memory, kind, sector, data);
    assert_eq!(status(T_OUT, 0, Data::Out(&[5; 8192])), 0);
    assert_eq!(status(T_DISCARD, 0, Data::Out(&range(0, 8, 0))), 0);
    assert_eq!(status(T_DISCARD, 0, Data::Out(&range(0, 8, 1))), 2, "UNMAP means nothing to a discard");
    assert_eq!(status(T_WRITE_ZEROES, 0, Data::Out(&range(8, 8, 1))), 0);
    assert_eq!(status(T_WRITE_ZEROES, 0, Data::Out(&range(8, 8, 2))), 2, "an unknown flag");
    assert_eq!(status(T_WRITE_ZEROES, 0, Data::Out(&[range(0, 1, 0), range(1, 1, 1)].concat())), 0);
    assert_eq!(status(T_WRITE_ZEROES, 0, Data::Out(&range(last, 1, 0))), 1, "beyond the end");
    assert_eq!(status(T_WRITE_ZEROES, 0, Data::Out(&range(0, u32::MAX, 0))), 1, "longer than allowed");
    assert_eq!(status(T_WRITE_ZEROES, 0, Data::Out(&range(u64::MAX, 1, 0))), 1, "an offset that overflows");
    assert_eq!(status(T_DISCARD, 0, Data::Out(&range(0, 1, 0)[..15])), 1, "half a range");
    assert_eq!(status(T_DISCARD, 0, Data::Out(&range(0, 1, 0).repeat(33))), 1, "too many ranges");
    assert_eq!(status(T_DISCARD, 0, Data::None), 1, "no range");
    assert_eq!(status(T_IN, 0, Data::In(100)), 1, "not whole sectors");
    assert_eq!(status(T_IN, last, Data::In(512)), 1, "beyond the end");
    assert_eq!(status(T_OUT, last - 1, Data::Out(&[0; 1024])), 1, "across the end");
    assert_eq!(status(T_OUT, u64::MAX, Data::Out(&[0; 512])), 1, "a sector that overflows");
    assert_eq!(status(T_OUT, 0, Data::In(512)), 0, "a write of nothing");
    assert_eq!(status(99, 0, Data::None), 2, "an unknown kind");
    assert_eq!(status(T_GET_ID, 0, Data::In(20)), 0);
    assert_eq!(queue.read_data(memory, 0, 20), b"serial-0123456789-an");
    assert_eq!(queue.run(memory, T_IN, 0, Data::In(8192)), 0);
    assert_eq!(queue.read_data(memory, 0, 8192), [0; 8192]);
}

#[test]
fn a_read_only_export_refuses_writes() {
    let options = ExportOptions { read_only: true, ..ExportOptions::default() };
    let server = Server::with(Arc::new(MemoryDisk::new(DISK, 1)), options);
    let (frontend, mut queue) = started(&server);
    assert!(frontend.features & F_RO != 0);
    assert_eq!(queue.run(&frontend.memory, T_OUT, 0, Data::Out(&[1; 512])), 1);
    assert_eq!(queue.run(&frontend.memory, T_IN, 0, Data::In(512)), 0);
    assert_eq!(queue.read_data(&frontend.memory, 0, 512), [0; 512]);
}

#[test]
fn requests_are_framed_at_will() {
    let server = Server::start();
    let (frontend, mut queue) = started(&server);
    let memory = &frontend.memory;
    let area = queue.data;
    let guest = GUEST + area;
    let desc = |offset: u64, len: u32, flags: u16, next: u16| Desc { address: guest + offset, len, flags, next };
    memory.write(area, &[1, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
    memory.write(area + 16, &[0x5a; 512]);
    // The header in two parts, the second with the data behind it; an empty descriptor; the status in a descriptor of nine.
    queue.set_desc(memory, 0, desc(0, 5, NEXT, 1));
    queue.set_desc(memory, 1, desc(5, 300, NEXT, 2));
    queue.set_desc(memory, 2, desc(305, 0, NEXT, 3));
    queue.set_desc(memory, 3, desc(305, 223, NEXT, 4));
    queue.set_desc(memory, 4, desc(1024, 9, WRITE, 0));
    memory.write(area + 1032, &[0xee]);
    queue.offer(memory, 0);
    queue.kick();
    queue.wait_used(memory);
    assert_eq!(memory.read(area + 1032, 1), [0]);
    assert_eq!(queue.run(memory, T_IN, 3, Data::In(512)), 0);
    assert_eq!(queue.read_data(memory, 0, 512), [0x5a; 512]);
    // The same through an indirect table behind a direct header.
    memory.write(area, &[0; 16]);
    memory.write(area + 8, &[3]);
    memory.write(area + 2048, &[desc(4096, 100, WRITE | NEXT, 1).bytes(), desc(4196, 413, WRITE, 0).bytes()].concat());
    queue.set_desc(memory, 0, desc(0, 16, NEXT, 1));
    queue.set_desc(memory, 1, desc(2048, 32, INDIRECT, 0));
    queue.offer(memory, 0);
    queue.kick();
    assert_eq!(queue.wait_used(memory), (0, 513));
    assert_eq!(memory.read(area + 4096, 512), [0x5a; 512]);
    assert_eq!(memory.read(area + 4096 + 512, 1), [0]);
}
