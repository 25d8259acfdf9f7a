//! The NBD generator against a server whose every byte is scripted here.
//!
//! The server keeps a disk in memory, answers a batch in reverse order, and writes its replies in pieces of odd sizes.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use benches::load::Timing;
use benches::nbd::{Address, Connection, NbdLoad};
use benches::requests::{Access, Workload};

const SIZE: u64 = 1 << 20;
const TIMING: Timing = Timing { warm_up: Duration::ZERO, measure: Duration::from_millis(200) };

#[derive(Clone, Copy, PartialEq, Eq)]
enum Replies {
    Simple,
    /// Data in two chunks, then an empty last one.
    Structured,
    /// As `Simple`, but one byte of every reply is wrong.
    Corrupt,
    /// As `Simple`, but the connection ends after a few requests.
    HangUp,
}

struct Server {
    stream: UnixStream,
    disk: Arc<Mutex<Vec<u8>>>,
    replies: Replies,
}

impl Server {
    fn bytes<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).ok().map(|()| bytes)
    }

    fn handshake(&mut self) {
        self.stream.write_all(b"NBDMAGICIHAVEOPT\x00\x03").unwrap();
        assert_eq!(self.bytes::<4>().unwrap(), [0, 0, 0, 3]);
        loop {
            assert_eq!(&self.bytes::<8>().unwrap(), b"IHAVEOPT");
            let option = u32::from_be_bytes(self.bytes().unwrap());
            let mut data = vec![0; u32::from_be_bytes(self.bytes().unwrap()) as usize];
            self.stream.read_exact(&mut data).unwrap();
            match option {
                8 if self.replies == Replies::Structured => self.option_reply(8, 1, &[]),
                8 => self.option_reply(8, 0x8000_0001, b"no"),
                7 => {
                    assert_eq!(data, b"\x00\x00\x00\x04disk\x00\x00");
                    let info = [&[0, 0][..], &SIZE.to_be_bytes(), &[0, 1]].concat();
                    self.option_reply(7, 3, &[0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0]);
                    self.option_reply(7, 3, &info);
                    return self.option_reply(7, 1, &[]);
                }
                other => panic!("option {other}"),
            }
        }
    }

    fn option_reply(&mut self, option: u32, kind: u32, data: &[u8]) {
        let mut bytes = 0x0003_e889_0455_65a9u64.to_be_bytes().to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        self.stream.write_all(&bytes).unwrap();
    }

    /// Serves until the client leaves. Requests that arrive within a millisecond of each other are one batch.
    fn serve(mut self) {
        self.handshake();
        let mut batch: Vec<Vec<u8>> = Vec::new();
        let mut served = 0;
        loop {
            let wait = (!batch.is_empty()).then_some(Duration::from_millis(1));
            self.stream.set_read_timeout(wait).unwrap();
            let mut magic = [0; 1];
            match self.stream.read(&mut magic) {
                Ok(0) => return,
                Err(_) if batch.is_empty() => return,
                Err(_) => {
                    let replies: Vec<u8> = batch.drain(..).rev().flatten().collect();
                    let mut piece = 1;
                    for bytes in replies.chunks(3001) {
                        let (first, second) = bytes.split_at(piece.min(bytes.len()));
                        if self.stream.write_all(first).and_then(|()| self.stream.write_all(second)).is_err() {
                            return;
                        }
                        piece = piece * 7 % 1009;
                    }
                    continue;
                }
                Ok(_) => {}
            }
            self.stream.set_read_timeout(None).unwrap();
            match self.request() {
                Some(reply) => batch.push(reply),
                None => return,
            }
            served += 1;
            if self.replies == Replies::HangUp && served == 20 {
                return;
            }
        }
    }

    /// Reads a request whose first byte is already read and returns its reply.
    fn request(&mut self) -> Option<Vec<u8>> {
        let header = self.bytes::<27>()?;
        assert_eq!(header[..3], [0x60, 0x95, 0x13]);
        let command = u16::from_be_bytes([header[5], header[6]]);
        let cookie: [u8; 8] = header[7..15].try_into().unwrap();
        let offset = u64::from_be_bytes(header[15..23].try_into().unwrap());
        let length = u32::from_be_bytes(header[23..27].try_into().unwrap()) as usize;
        let range = offset as usize..offset as usize + length;
        let simple = [&0x6744_6698u32.to_be_bytes()[..], &[0; 4], &cookie].concat();
        match command {
            0 => {
                let mut data = self.disk.lock().unwrap()[range].to_vec();
                if self.replies == Replies::Corrupt {
                    data[length / 2] ^= 1;
                }
                Some(match self.replies {
                    Replies::Structured => structured(cookie, offset, &data),
                    _ => [simple, data].concat(),
                })
            }
            1 => {
                let mut data = vec![0; length];
                self.stream.read_exact(&mut data).ok()?;
                self.disk.lock().unwrap()[range].copy_from_slice(&data);
                Some(simple)
            }
            2 => None,
            other => panic!("command {other}"),
        }
    }
}

fn structured(cookie: [u8; 8], offset: u64, data: &[u8]) -> Vec<u8> {
    let chunk = |flags: u16, kind: u16, payload: &[u8]| {
        let head = [&0x668e_33efu32.to_be_bytes()[..], &flags.to_be_bytes(), &kind.to_be_bytes(), &cookie];
        [&head.concat()[..], &(payload.len() as u32).to_be_bytes(), payload].concat()
    };
    let (first, second) = data.split_at(data.len() / 3);
    [
        chunk(0, 1, &[&(offset + first.len() as u64).to_be_bytes(), second].concat()),
        chunk(0, 1, &[&offset.to_be_bytes(), first].concat()),
        chunk(1, 0, &[]),
    ]
    .concat()
}

fn serve(socket: &Path, connections: usize, replies: Replies) -> JoinHandle<()> {
    let listener = UnixListener::bind(socket).unwrap();
    let disk = Arc::new(Mutex::new(vec![0; SIZE as usize]));
    std::thread::spawn(move || {
        let serve_one = |stream| {
            std::thread::spawn({
                let disk = Arc::clone(&disk);
                move || Server { stream, disk, replies }.serve()
            })
        };
        let threads: Vec<_> = (0..connections).map(|_| serve_one(listener.accept().unwrap().0)).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    })
}

fn load(socket: &Path, connections: usize, structured_replies: bool) -> NbdLoad {
    NbdLoad {
        address: Address::Unix(socket.into()),
        export: "disk".into(),
        connections,
        structured_replies,
        workload: Workload { block_size: 4096, depth: 16, access: Access::Random, write_percent: 50 },
        span: None,
    }
}

fn verify(connections: usize, structured_replies: bool, replies: Replies) -> anyhow::Result<u64> {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("nbd.sock");
    let server = serve(&socket, connections, replies);
    let result = load(&socket, connections, structured_replies).verify(TIMING, 11);
    server.join().unwrap();
    result.map(|report| report.operations)
}

#[test]
fn simple_replies() {
    assert!(verify(1, false, Replies::Simple).unwrap() > 0);
}

#[test]
fn structured_replies_on_two_connections() {
    assert!(verify(2, true, Replies::Structured).unwrap() > 0);
}

#[test]
fn structured_replies_are_not_needed() {
    assert!(verify(1, true, Replies::Simple).unwrap() > 0);
}

#[test]
fn one_wrong_byte_is_noticed() {
    let error = verify(1, false, Replies::Corrupt).unwrap_err().to_string();
    assert!(error.contains("is not what was written there"), "{error}");
}

#[test]
fn a_server_that_hangs_up_is_an_error() {
    let error = format!("{:#}", verify(1, false, Replies::HangUp).unwrap_err());
    let known = ["the NBD server closed the connection", "send to the NBD server", "receive from the NBD server"];
    assert!(known.iter().any(|known| error.contains(known)), "{error}");
}

#[test]
fn greetings_that_are_not_newstyle_are_refused() {
    for (greeting, wanted) in [
        (&b"HTTP/1.1 400 Bad Request\r\n"[..], "does not speak NBD"),
        (b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\x00\x00", "oldstyle NBD only"),
        (b"NBDMAGICIHAVEOPT\x00\x00", "lacks fixed newstyle"),
        (b"NBDMAGIC", "read from the server"),
    ] {
        let (mut server, client) = UnixStream::pair().unwrap();
        server.write_all(greeting).unwrap();
        server.shutdown(std::net::Shutdown::Write).unwrap();
        let error = format!("{:#}", Connection::negotiate(client, "disk", false).err().unwrap());
        assert!(error.contains(wanted), "{error}");
    }
}

#[test]
fn the_reason_of_a_refusal_is_shown() {
    let (mut server, client) = UnixStream::pair().unwrap();
    server.write_all(b"NBDMAGICIHAVEOPT\x00\x03").unwrap();
    server.write_all(&0x0003_e889_0455_65a9u64.to_be_bytes()).unwrap();
    server.write_all(b"\x00\x00\x00\x07\x80\x00\x00\x06\x00\x00\x00\x0eno such export").unwrap();
    let error = format!("{:#}", Connection::negotiate(client, "disk", false).err().unwrap());
    assert!(error.contains("refused with error 6: no such export"), "{error}");
}
