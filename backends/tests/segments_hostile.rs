//! The segment store in a bucket, against a server that lies, breaks off and never ends. It speaks just enough HTTP to say what a test wants.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use backends::segments::drive::block_on;
use backends::segments::object::{S3Config, S3Store};
use backends::segments::{OBJECT_LEN_MAX, OpenOptions, PoolHeader, SegmentStore, StoreError, Tag};
use bytes::Bytes;
use tokio::runtime::Runtime;
use uuid::Uuid;

/// What is answered to a method and a path, as bytes on the connection.
type Script = dyn Fn(&str, &str) -> Vec<u8> + Send + Sync;

fn answer(status: u16, headers: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 {status} Text\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n", body.len());
    [head.as_bytes(), body].concat()
}

fn error(status: u16, code: &str) -> Vec<u8> {
    answer(status, "", format!("<Error><Code>{code}</Code></Error>").as_bytes())
}

fn serve(mut client: TcpStream, script: &Script) -> std::io::Result<()> {
    let mut reader = BufReader::new(client.try_clone()?);
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let (mut line, mut len) = (String::new(), 0);
    while reader.read_line(&mut line)? > 2 {
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            len = value.trim().parse().unwrap();
        }
        line.clear();
    }
    std::io::copy(&mut std::io::Read::take(&mut reader, len), &mut std::io::sink())?;
    let mut words = first.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let said = match path {
        "/bucket/pool" => answer(200, "ETag: \"1\"\r\n", &PoolHeader::new(Uuid::nil()).encode()),
        path => script(method, path),
    };
    client.write_all(&said)
}

struct Liar {
    store: S3Store,
    _runtime: Runtime,
}

impl Liar {
    fn start(script: impl Fn(&str, &str) -> Vec<u8> + Send + Sync + 'static) -> Liar {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let script: Arc<Script> = Arc::new(script);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let script = script.clone();
                // What the client does not wait for cannot be written; that is no fault of the test.
                thread::spawn(move || serve(client, &*script));
            }
        });
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let options = OpenOptions { expected: None, read_only: false, probe: None };
        let store = S3Store::open(config(address), runtime.handle().clone(), options).unwrap();
        Liar { store, _runtime: runtime }
    }

    fn read(&self) -> Result<Bytes, StoreError> {
        block_on(self.store.read("a", 0..100))
    }
}

fn config(address: SocketAddr) -> S3Config {
    S3Config {
        endpoint: Some(format!("http://{address}")),
        allow_http: true,
        // One attempt, and a second one.
        retry_timeout: Duration::from_millis(250),
        ..S3Config::new("bucket", "key", "secret")
    }
}

fn is_unknown<T>(outcome: &Result<T, StoreError>) -> bool {
    matches!(outcome, Err(StoreError::Unknown(_)))
}

fn is_refused<T>(outcome: &Result<T, StoreError>) -> bool {
    matches!(outcome, Err(StoreError::Refused(_)))
}

#[test]
fn only_no_such_key_makes_an_object_absent() {
    let read = |said: fn(&str, &str) -> Vec<u8>| Liar::start(said).read();
    assert!(matches!(read(|_, _| error(404, "NoSuchKey")), Err(StoreError::Absent(_))));
    assert!(is_refused(&read(|_, _| error(404, "NoSuchBucket"))));
    assert!(is_refused(&read(|_, _| answer(404, "", b"<html>not here</html>"))));
    assert!(is_refused(&read(|_, _| answer(404, "", b""))));
    let liar = Liar::start(|_, _| answer(404, "", b"<html>not here</html>"));
    assert!(is_refused(&block_on(liar.store.read_root("r"))));
    assert!(is_refused(&block_on(liar.store.swap("r", Some(&Tag("1-\"x\"".to_owned())), Bytes::new()))));
    assert!(is_refused(&block_on(liar.store.list(""))));
}

#[test]
fn an_answer_of_another_length_is_none() {
    let said = |range: &'static str, len: usize| {
        move |_: &str, _: &str| answer(206, &format!("ETag: \"1\"\r\nContent-Range: bytes {range}\r\n"), &vec![7; len])
    };
    assert_eq!(Liar::start(said("0-99/100", 100)).read(), Ok(Bytes::from(vec![7; 100])));
    assert_eq!(Liar::start(said("0-49/50", 50)).read(), Ok(Bytes::from(vec![7; 50])));
    for (range, len) in
        [("0-99/100", 99), ("0-99/100", 0), ("0-49/50", 51), ("5-99/100", 95), ("0-9/100", 10), ("0-199/200", 200)]
    {
        let read = Liar::start(said(range, len)).read();
        assert!(is_unknown(&read), "{range}, {len} bytes: {read:?}");
    }
    let cut = |_: &str, _: &str| {
        let mut whole = answer(206, "ETag: \"1\"\r\nContent-Range: bytes 0-99/100\r\n", &[7; 100]);
        whole.truncate(whole.len() - 1);
        whole
    };
    assert!(is_unknown(&Liar::start(cut).read()));
    let chunked = |_: &str, _: &str| {
        let head = "HTTP/1.1 206 Text\r\nConnection: close\r\nETag: \"1\"\r\nTransfer-Encoding: chunked\r\n";
        format!("{head}Content-Range: bytes 0-99/100\r\n\r\n5\r\nabcde\r\n0\r\n\r\n").into_bytes()
    };
    assert!(is_unknown(&Liar::start(chunked).read()));
}

#[test]
fn a_range_that_is_refused_within_the_object_is_no_end() {
    let said = |len: &'static str| {
        move |method: &str, _: &str| match method {
            "HEAD" => format!("HTTP/1.1 200 Text\r\nConnection: close\r\nContent-Length: {len}\r\n\r\n").into_bytes(),
            _ => error(416, "InvalidRange"),
        }
    };
    assert_eq!(Liar::start(said("0")).read(), Ok(Bytes::new()));
    assert!(is_unknown(&Liar::start(said("100")).read()));
}

#[test]
fn nothing_is_read_without_a_limit() {
    let huge = OBJECT_LEN_MAX * 1000;
    let endless = move |status: u16| {
        let head = format!("HTTP/1.1 {status} Text\r\nConnection: close\r\nETag: \"1\"\r\nContent-Length: {huge}\r\n\r\n");
        [head.into_bytes(), vec![b'x'; 1 << 20]].concat()
    };
    let liar = Liar::start(move |_, _| endless(200));
    assert!(is_unknown(&block_on(liar.store.read_root("r"))));
    assert!(is_unknown(&block_on(liar.store.list(""))));
    let liar = Liar::start(move |_, _| endless(403));
    assert!(is_refused(&liar.read()));
    assert!(is_refused(&block_on(liar.store.create("a", Vec::new()))));
}

#[test]
fn the_outcome_of_a_put_is_what_the_server_says_and_no_more() {
    let create = |said: Vec<u8>| block_on(Liar::start(move |_, _| said.clone()).store.create("a", Vec::new()));
    assert_eq!(create(answer(200, "ETag: \"1\"\r\n", b"")), Ok(()));
    assert!(matches!(create(error(412, "PreconditionFailed")), Err(StoreError::Exists(_))));
    for said in
        [error(409, "ConditionalRequestConflict"), error(503, "SlowDown"), error(500, "InternalError"), answer(200, "", b"")]
    {
        let outcome = create(said);
        assert!(is_unknown(&outcome), "{outcome:?}");
    }
    assert!(is_unknown(&create(Vec::new())), "it hung up");
    assert!(is_unknown(&create(b"SSH-2.0-OpenSSH\r\n".to_vec())), "it is no HTTP server");
    for said in [error(507, "Any"), error(403, "QuotaExceeded")] {
        assert!(matches!(create(said), Err(StoreError::NoSpace(_))));
    }
    for said in [error(403, "AccessDenied"), error(404, "NoSuchBucket"), error(501, "NotImplemented"), answer(301, "", b"")] {
        let outcome = create(said);
        assert!(is_refused(&outcome), "{outcome:?}");
    }
}

#[test]
fn the_outcome_of_a_swap_is_what_the_server_says_and_no_more() {
    let known = Tag("3-\"x\"".to_owned());
    let swap = |said: Vec<u8>| block_on(Liar::start(move |_, _| said.clone()).store.swap("r", Some(&known), Bytes::new()));
    assert_eq!(swap(answer(200, "ETag: \"y\"\r\n", b"")), Ok(Tag("4-\"y\"".to_owned())));
    for said in [error(412, "PreconditionFailed"), error(404, "NoSuchKey")] {
        assert!(matches!(swap(said), Err(StoreError::Changed(_))));
    }
    for said in [error(409, "ConditionalRequestConflict"), error(503, "SlowDown"), answer(200, "", b""), Vec::new()] {
        let outcome = swap(said);
        assert!(is_unknown(&outcome), "{outcome:?}");
    }
}

#[test]
fn strange_listings_do_no_harm() {
    let page = |keys: &[&str], token: &str| {
        let key = |key: &&str| {
            format!("<Contents><Key>{key}</Key><Size>5</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>")
        };
        let keys: String = keys.iter().map(key).collect();
        answer(200, "", format!("<ListBucketResult>{keys}{token}</ListBucketResult>").as_bytes())
    };
    let token = "<NextContinuationToken>again</NextContinuationToken>";
    let circle = Liar::start(move |_, _| page(&["objects/a="], token));
    assert!(is_unknown(&block_on(circle.store.list(""))));
    let strangers =
        Liar::start(move |_, _| page(&["objects/a=", "objects/b", "elsewhere/c=", "objects/UP=", "objects/w/d="], ""));
    let listed = block_on(strangers.store.list("")).unwrap();
    assert_eq!(listed.iter().map(|listed| listed.name.as_str()).collect::<Vec<_>>(), ["a", "w/d"]);
    let listed = block_on(strangers.store.list("w/")).unwrap();
    assert_eq!(listed.len(), 1, "what was not asked for is passed over");
    let escaping = Liar::start(move |_, _| page(&["objects/../../etc=", "objects//a="], ""));
    assert!(block_on(escaping.store.list("")).is_err() || block_on(escaping.store.list("")).unwrap().is_empty());
    assert!(is_unknown(&block_on(Liar::start(|_, _| answer(200, "", b"<not xml")).store.list(""))));
}
