//! A bucket of an S3 server as a store, through the crate `object_store`.
//!
//! ```text
//!   bucket/PREFIX/pool             what pool this is
//!   bucket/PREFIX/objects/NAME=    the content of object NAME
//!   bucket/PREFIX/roots/NAME=      see `roots`; the tag is the counter and the server's ETag
//!
//!   any thread ──spawn──▶ tokio ── attempt ── object_store ── HTTP        the answer comes back through `reply`
//! ```
//!
//! Invariants:
//! - `create` and `swap` are one request, sent once. Its loss is `Unknown`: a retry would meet its own success.
//! - What changes nothing, and `delete`, is tried again until its time is over.
//! - An object is absent only if the server says `NoSuchKey`; a missing bucket, a proxy's 404 or a cut answer never mean that.
//! - No answer is longer than what was asked for, and a shorter one is an error.

mod failure;
mod http;

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use blockdev::clock;
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::list::{PaginatedListOptions, PaginatedListStore};
use object_store::path::Path;
use object_store::{
    ClientOptions, GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload, RetryConfig, UpdateVersion,
};
use tokio::runtime::Handle;
use uuid::Uuid;

use self::failure::Failure;
use super::drive::block_on;
use super::header::HEADER_LEN;
use super::names::{from_stored, stored};
use super::reply::{self, Reply};
use super::roots::{self, Stored};
use super::{
    Listed, OBJECT_LEN_MAX, OpenOptions, PoolHeader, SegmentStore, StoreError, StoreFuture, Tag, check_object_len, names, probe,
};

/// Between two attempts: the first pause, doubled each time up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Where a bucket is, and how to reach it.
#[derive(Clone)]
pub struct S3Config {
    pub bucket: String,
    /// The server's URL; Amazon's own if `None`.
    pub endpoint: Option<String>,
    pub region: String,
    /// What all keys begin with, so that pools can share a bucket: a path, or nothing.
    pub prefix: String,
    pub access_key_id: String,
    /// Secret: never shown.
    pub secret_key: String,
    /// The longest that connecting may take.
    pub connect_timeout: Duration,
    /// The longest that one request may take, with the whole answer.
    pub request_timeout: Duration,
    /// After this time, what may be tried again is not.
    pub retry_timeout: Duration,
    /// Whether `http://` will do.
    pub allow_http: bool,
}

impl S3Config {
    /// A bucket, with the usual settings for the rest.
    pub fn new(bucket: &str, access_key_id: &str, secret_key: &str) -> S3Config {
        S3Config {
            bucket: bucket.to_owned(),
            endpoint: None,
            region: "us-east-1".to_owned(),
            prefix: String::new(),
            access_key_id: access_key_id.to_owned(),
            secret_key: secret_key.to_owned(),
            connect_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(60),
            retry_timeout: Duration::from_secs(120),
            allow_http: false,
        }
    }

    /// For people: where it is.
    pub fn location(&self) -> String {
        let server = self.endpoint.as_deref().unwrap_or("Amazon S3");
        format!("bucket {} prefix {:?} of {server}", self.bucket, self.prefix)
    }

    fn check(&self) -> Result<(), StoreError> {
        let refused = |cause: &str| Err(StoreError::Refused(format!("{}: {cause}", self.location())));
        if self.endpoint.as_ref().is_some_and(|endpoint| endpoint.starts_with("http://")) && !self.allow_http {
            return refused("an endpoint without TLS is refused: use https://, or set allow_http where the network is trusted");
        }
        if self.bucket.is_empty() || self.access_key_id.is_empty() || self.secret_key.is_empty() {
            return refused("bucket, access_key_id and the secret key are all needed");
        }
        if !self.prefix.is_empty() && names::check(&self.prefix).is_err() {
            return refused("the prefix must be parts of a-z, 0-9, '.', '_' and '-', joined by '/'");
        }
        Ok(())
    }
}

impl fmt::Debug for S3Config {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "S3Config({}, region {})", self.location(), self.region)
    }
}

/// The store. Its work is done on the runtime it was given, and lost with it.
pub struct S3Store {
    bucket: Arc<Bucket>,
    runtime: Handle,
    header: PoolHeader,
    read_only: bool,
}

struct Bucket {
    client: AmazonS3,
    config: S3Config,
}

/// The content of a key.
struct Fetched {
    content: Bytes,
    e_tag: Option<String>,
}

impl S3Store {
    /// Makes a pool where there is none, after proving that the bucket can hold one. Blocks; not to be called on the runtime's own threads.
    pub fn make(config: S3Config, runtime: Handle, uuid: Uuid) -> Result<(), StoreError> {
        let header = PoolHeader::new(uuid);
        let store = S3Store { bucket: Arc::new(Bucket::new(config)?), runtime, header, read_only: false };
        let place = store.bucket.config.location();
        let read = |bucket: Arc<Bucket>| async move { bucket.header().await };
        if block_on(store.spawn(Ok(()), read))?.is_some() {
            return Err(StoreError::Exists(format!("{place}: a pool")));
        }
        block_on(probe::prove(&store, uuid))?;
        let content = Bytes::copy_from_slice(&header.encode());
        let put = |bucket: Arc<Bucket>| async move { bucket.put_new("its header", &bucket.header_key(), vec![content]).await };
        match block_on(store.spawn(Ok(()), put)) {
            // Whose it is tells what became of a request without an answer.
            Err(StoreError::Unknown(_) | StoreError::Exists(_)) if block_on(store.spawn(Ok(()), read))? == Some(header) => Ok(()),
            outcome => outcome,
        }
    }

    /// Opens a pool, and proves anew that conditions hold. Blocks; not to be called on the runtime's own threads.
    pub fn open(config: S3Config, runtime: Handle, options: OpenOptions) -> Result<S3Store, StoreError> {
        let header = PoolHeader::new(Uuid::nil());
        let mut store = S3Store { bucket: Arc::new(Bucket::new(config)?), runtime, header, read_only: options.read_only };
        let place = store.bucket.config.location();
        let found = block_on(store.spawn(Ok(()), |bucket| async move { bucket.header().await }))?;
        store.header = found.ok_or_else(|| StoreError::Absent(format!("{place}: a pool")))?;
        store.header.check(&place, options.expected, options.read_only)?;
        probe::prove_opening(&store, options)?;
        Ok(store)
    }

    /// What pool this is.
    pub fn header(&self) -> PoolHeader {
        self.header
    }

    fn spawn<T, F>(&self, checked: Result<(), StoreError>, work: impl FnOnce(Arc<Bucket>) -> F) -> StoreFuture<'static, T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        let (reply, answer): (Reply<T>, _) = reply::channel();
        match checked {
            Ok(()) => {
                let work = work(self.bucket.clone());
                self.runtime.spawn(async move { reply.send(work.await) });
            }
            Err(error) => reply.send(Err(error)),
        }
        Box::pin(answer)
    }

    fn check_writable(&self, name: &str) -> Result<(), StoreError> {
        match self.read_only {
            true => Err(StoreError::Refused(format!("{name}: the pool was opened read-only"))),
            false => names::check(name),
        }
    }
}

impl Bucket {
    fn new(config: S3Config) -> Result<Bucket, StoreError> {
        config.check()?;
        let once = RetryConfig { max_retries: 0, ..RetryConfig::default() };
        // The limits on a request are ours: see `http`.
        let options = ClientOptions::new()
            .with_connect_timeout(config.connect_timeout)
            .with_timeout_disabled()
            .with_http1_only()
            .with_allow_http(config.allow_http);
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(&config.bucket)
            .with_region(&config.region)
            .with_access_key_id(&config.access_key_id)
            .with_secret_access_key(&config.secret_key)
            .with_client_options(options)
            .with_retry(once)
            .with_disable_bulk_delete(true)
            .with_http_connector(http::Connector);
        if let Some(endpoint) = &config.endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        let client = builder.build().map_err(|error| StoreError::Refused(format!("{}: {error}", config.location())))?;
        Ok(Bucket { client, config })
    }

    fn key(&self, kind: &str, rest: &str) -> String {
        match self.config.prefix.as_str() {
            "" => format!("{kind}{rest}"),
            prefix => format!("{prefix}/{kind}{rest}"),
        }
    }

    fn object_key(&self, name: &str) -> String {
        self.key("objects/", &stored(name))
    }

    fn root_key(&self, name: &str) -> String {
        self.key("roots/", &stored(name))
    }

    fn header_key(&self) -> String {
        self.key("pool", "")
    }

    /// One attempt to put; never more.
    async fn put(&self, key: &str, content: Vec<Bytes>, mode: PutMode) -> Result<Option<String>, Failure> {
        let path = Path::from(key);
        let put = self.client.put_opts(&path, PutPayload::from_iter(content), PutOptions::from(mode));
        http::attempt(self.config.request_timeout, put).await.map(|put| put.e_tag)
    }

    async fn put_new(&self, what: &str, key: &str, content: Vec<Bytes>) -> Result<(), StoreError> {
        match self.put(key, content, PutMode::Create).await {
            Ok(_) => Ok(()),
            Err(failure) if failure.is_condition() => Err(StoreError::Exists(what.to_owned())),
            Err(failure) => Err(failure.into_error(what)),
        }
    }

    /// Tries until it succeeds, is refused, or the time is over.
    async fn repeat<T, F: Future<Output = object_store::Result<T>>>(&self, mut call: impl FnMut() -> F) -> Result<T, Failure> {
        let start = clock::monotonic();
        let mut pause = FIRST_PAUSE;
        loop {
            let left = self.config.retry_timeout.saturating_sub(clock::monotonic().saturating_duration_since(start));
            match http::attempt(self.config.request_timeout.min(left), call()).await {
                Err(failure) if failure.is_passing() && pause < left => {}
                outcome => return outcome,
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// A range of a key, or all of it, at most `len_max` bytes.
    async fn fetch(&self, key: &str, range: Option<Range<u64>>, len_max: u64) -> Result<Fetched, Failure> {
        let path = Path::from(key);
        self.repeat(|| async {
            let options = GetOptions { range: range.clone().map(GetRange::Bounded), ..GetOptions::default() };
            let got = self.client.get_opts(&path, options).await?;
            let e_tag = got.meta.e_tag.clone();
            let len = got.range.end.saturating_sub(got.range.start);
            if len > len_max {
                return Err(malformed(format!("{len} bytes are more than the {len_max} that are ever written")));
            }
            let mut content = BytesMut::with_capacity(len as usize);
            let mut stream = got.into_stream();
            while let Some(part) = stream.next().await {
                let part = part?;
                if (content.len() + part.len()) as u64 > len {
                    return Err(malformed(format!("more than the {len} bytes that were announced came")));
                }
                content.extend_from_slice(&part);
            }
            match content.len() as u64 == len {
                true => Ok(Fetched { content: content.freeze(), e_tag }),
                false => Err(malformed(format!("{} bytes came of {len}", content.len()))),
            }
        })
        .await
    }

    async fn header(&self) -> Result<Option<PoolHeader>, StoreError> {
        let place = self.config.location();
        match self.fetch(&self.header_key(), None, 4 * HEADER_LEN as u64).await {
            Ok(fetched) => PoolHeader::decode(&place, &fetched.content).map(Some),
            Err(failure) if failure.is_no_key() => Ok(None),
            Err(failure) => Err(failure.into_error(&place)),
        }
    }

    async fn read(&self, name: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let what = format!("object {name}");
        let key = self.object_key(name);
        // There are no empty ranges in HTTP, and servers misread very large numbers: of those, one byte tells whether the object is there.
        let is_empty = range.is_empty() || range.start >= OBJECT_LEN_MAX;
        let asked = if is_empty { 0..1 } else { range.start..range.end.min(OBJECT_LEN_MAX + 1) };
        match self.fetch(&key, Some(asked.clone()), OBJECT_LEN_MAX).await {
            Ok(fetched) => Ok(if is_empty { Bytes::new() } else { fetched.content }),
            Err(failure) if failure.is_past_end() => self.check_past_end(&what, &key, asked.start).await.map(|()| Bytes::new()),
            Err(failure) if failure.is_no_key() => Err(StoreError::Absent(what)),
            Err(failure) => Err(failure.into_error(&what)),
        }
    }

    /// Whether an object ends before `start` indeed. A server that cannot make sense of a range answers alike.
    async fn check_past_end(&self, what: &str, key: &str, start: u64) -> Result<(), StoreError> {
        let path = Path::from(key);
        match self.repeat(|| self.client.head(&path)).await {
            Ok(meta) if meta.size <= start => Ok(()),
            Ok(meta) => {
                let len = meta.size;
                Err(StoreError::Unknown(format!(
                    "{what}: the server gives nothing from {start} on, though the object has {len} bytes"
                )))
            }
            Err(failure) if failure.is_gone() => Err(StoreError::Absent(what.to_owned())),
            Err(failure) => Err(failure.into_error(what)),
        }
    }

    async fn delete(&self, name: &str) -> Result<(), StoreError> {
        let path = Path::from(self.object_key(name));
        match self.repeat(|| self.client.delete(&path)).await {
            Err(failure) if !failure.is_no_key() => Err(failure.into_error(&format!("deleting object {name}"))),
            _ => Ok(()),
        }
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        let folder = self.key("objects/", "");
        let asked = format!("{folder}{prefix}");
        let mut listed = Vec::new();
        let mut token: Option<String> = None;
        loop {
            let page = self.repeat(|| {
                let options = PaginatedListOptions { page_token: token.clone(), ..PaginatedListOptions::default() };
                self.client.list_paginated(Some(&asked), options)
            });
            let page = page.await.map_err(|failure| failure.into_error(&format!("listing {prefix:?}")))?;
            for object in page.result.objects {
                let name = object.location.as_ref().strip_prefix(&folder).and_then(from_stored);
                let name = name.filter(|name| name.starts_with(prefix)).map(str::to_owned);
                listed.extend(name.map(|name| Listed { name, len: object.size }));
            }
            match page.page_token {
                None => break,
                next if next == token => {
                    return Err(StoreError::Unknown(format!("listing {prefix:?}: the server turns in a circle")));
                }
                next => token = next,
            }
        }
        listed.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        Ok(listed)
    }

    async fn read_root(&self, name: &str) -> Result<Option<(Bytes, Tag)>, StoreError> {
        let what = format!("root {name}");
        match self.fetch(&self.root_key(name), None, roots::STORED_LEN_MAX).await {
            Ok(Fetched { content, e_tag: Some(e_tag) }) => {
                let root = Stored::decode(name, &content)?;
                Ok(Some((root.content, tag_of(root.counter, &e_tag))))
            }
            Ok(_) => Err(StoreError::Refused(format!("{what}: the server gives no ETag, without which nothing can be swapped"))),
            Err(failure) if failure.is_no_key() => Ok(None),
            Err(failure) => Err(failure.into_error(&what)),
        }
    }

    async fn swap(&self, name: &str, expected: Option<&Tag>, content: Bytes) -> Result<Tag, StoreError> {
        let what = format!("root {name}");
        let (next, mode) = match expected.map(parts_of) {
            None => (1, PutMode::Create),
            Some(None) => return Err(StoreError::Changed(what)),
            Some(Some((counter, e_tag))) => {
                let version = UpdateVersion { e_tag: Some(e_tag.to_owned()), version: None };
                (counter + 1, PutMode::Update(version))
            }
        };
        let has_version = expected.is_some();
        match self.put(&self.root_key(name), vec![Stored::new(next, content).encode()], mode).await {
            Ok(Some(e_tag)) => Ok(tag_of(next, &e_tag)),
            Ok(None) => Err(StoreError::Unknown(format!("{what}: the server gives no ETag"))),
            Err(failure) if failure.is_condition() || has_version && failure.is_no_key() => Err(StoreError::Changed(what)),
            Err(failure) => Err(failure.into_error(&what)),
        }
    }
}

fn malformed(what: String) -> object_store::Error {
    object_store::Error::Generic { store: "S3", source: what.into() }
}

fn tag_of(counter: u64, e_tag: &str) -> Tag {
    Tag(format!("{counter}-{e_tag}"))
}

/// Counter and ETag of a tag that this kind of store gave; both fit to be used again.
fn parts_of(tag: &Tag) -> Option<(u64, &str)> {
    let (counter, e_tag) = tag.0.split_once('-')?;
    let counter = counter.parse().ok().filter(|counter| *counter < u64::MAX)?;
    let is_good = !e_tag.is_empty() && e_tag.bytes().all(|byte| byte.is_ascii_graphic());
    is_good.then_some((counter, e_tag))
}

impl SegmentStore for S3Store {
    fn create<'a>(&'a self, name: &'a str, content: Vec<Bytes>) -> StoreFuture<'a, ()> {
        let checked = self.check_writable(name).and_then(|()| check_object_len(name, &content));
        let name = name.to_owned();
        self.spawn(checked, |bucket| async move {
            bucket.put_new(&format!("object {name}"), &bucket.object_key(&name), content).await
        })
    }

    fn read<'a>(&'a self, name: &'a str, range: Range<u64>) -> StoreFuture<'a, Bytes> {
        let (checked, name) = (names::check(name), name.to_owned());
        self.spawn(checked, |bucket| async move { bucket.read(&name, range).await })
    }

    fn delete<'a>(&'a self, name: &'a str) -> StoreFuture<'a, ()> {
        let (checked, name) = (self.check_writable(name), name.to_owned());
        self.spawn(checked, |bucket| async move { bucket.delete(&name).await })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, Vec<Listed>> {
        let (checked, prefix) = (names::check_prefix(prefix), prefix.to_owned());
        self.spawn(checked, |bucket| async move { bucket.list(&prefix).await })
    }

    fn read_root<'a>(&'a self, name: &'a str) -> StoreFuture<'a, Option<(Bytes, Tag)>> {
        let (checked, name) = (names::check(name), name.to_owned());
        self.spawn(checked, |bucket| async move { bucket.read_root(&name).await })
    }

    fn swap<'a>(&'a self, name: &'a str, expected: Option<&'a Tag>, content: Bytes) -> StoreFuture<'a, Tag> {
        let checked = self.check_writable(name).and_then(|()| roots::check_len(name, &content));
        let (name, expected) = (name.to_owned(), expected.cloned());
        self.spawn(checked, |bucket| async move { bucket.swap(&name, expected.as_ref(), content).await })
    }
}
