//! The history of a volume in its store: claiming it, reading it, adding to it, and losing it to another owner.
//!
//! ```text
//!   root ─▶ w/1/0 ─▶ w/1/1 ─▶ w/1/2 = SEAL{next 4} ─▶ w/4/0 ─▶ …            epoch 4 took over from epoch 1
//! ```
//!
//! An owner claims an epoch by swapping the root, then follows the chain from the checkpoint and seals the first place that is absent. From
//! then on the owner before cannot add anything: its next segment collides with the seal. Seals are never deleted, so a late request of
//! a dead owner meets them too.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use backends::segments::{OBJECT_LEN_MAX, SegmentStore, StoreError, Tag};
use bytes::Bytes;

use crate::environment::{Environment, random_id};
use crate::error::VolumeError;
use crate::log::LogId;
use crate::meta::{Meta, Parent};
use crate::names::{Group, Source, root_path};
use crate::object::{self, Object};
use crate::reduce::Secrets;
use crate::root::Root;
use crate::segment::{self, Link, Place, Segment};
use crate::troubles::{Cause, Troubles};

/// Places read at once.
const AHEAD: u64 = 8;
/// Read at once in the hope that a header fits.
const HEADER_GUESS: u64 = 64 << 10;
const PAUSE_FIRST: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// A volume in a store.
#[derive(Clone)]
pub(crate) struct Chain {
    pub(crate) store: Rc<dyn SegmentStore>,
    pub(crate) environment: Rc<dyn Environment>,
    pub(crate) group: Group,
    pub(crate) secrets: Secrets,
    pub(crate) troubles: Rc<Troubles>,
}

/// What an owner knows when the volume is its own.
pub(crate) struct Claimed {
    pub(crate) root: Root,
    pub(crate) tag: Tag,
    pub(crate) meta: Meta,
    /// The history since the checkpoint, without seals.
    pub(crate) segments: Vec<Segment>,
}

/// Where a history ends.
enum End {
    /// Nothing stands there yet.
    Absent(Place),
    /// It goes on in an epoch that is not followed.
    Sealed { next: u64 },
}

impl Chain {
    /// Makes the root of a new volume; not if the store takes nothing now. What may be there already is not given up.
    pub(crate) async fn create(&self, root: &Root) -> Result<(), VolumeError> {
        let name = root_path(&self.group);
        let (mut pause, mut may_be_there) = (PAUSE_FIRST, false);
        loop {
            match self.store.swap(&name, None, root.encode()).await {
                Ok(_) => return Ok(()),
                Err(StoreError::Changed(_) | StoreError::Unknown(_)) => {
                    may_be_there = true;
                    match self.store.read_root(&name).await {
                        Ok(Some((bytes, _))) if bytes == root.encode() => return Ok(()),
                        Ok(Some(_)) => return Err(VolumeError::VolumeExists),
                        Ok(None) | Err(StoreError::Unknown(_) | StoreError::Refused(_)) => self.pause(&mut pause).await,
                        Err(error) => return Err(error.into()),
                    }
                }
                Err(StoreError::NoSpace(_) | StoreError::Refused(_)) if may_be_there => self.pause(&mut pause).await,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Takes the volume over: afterwards no earlier owner can add to it. `before` is the root on which everything was decided: if it has changed
    /// since, nothing is done. `log_id` is the local log that the new owner will write, and `is_local` whether flushes rest on it.
    pub(crate) async fn claim(&self, before: (Root, Tag), log_id: LogId, is_local: bool) -> Result<Claimed, VolumeError> {
        let (root, tag) = self.claim_root(before, log_id, is_local).await?;
        let meta = self.meta_of(&root).await?.ok_or(VolumeError::Fenced)?;
        let mut segments = Vec::new();
        let mut place = root.checkpoint.place;
        loop {
            match self.follow(&root, place, root.epoch, &mut segments).await? {
                End::Absent(end) => {
                    self.seal(&root, end).await?;
                    place = end;
                }
                End::Sealed { next } if next == root.epoch => break,
                End::Sealed { .. } => return Err(VolumeError::Fenced),
            }
        }
        let (now, _) = self.read_root().await?;
        if now.owner != root.owner {
            return Err(VolumeError::Fenced);
        }
        Ok(Claimed { root, tag, meta, segments })
    }

    /// The group as its last owner left it, claimed by nobody: its history goes as far as the store has it. Fails if it is being taken over.
    pub(crate) async fn look(&self) -> Result<Claimed, VolumeError> {
        let (root, tag) = self.read_root().await?;
        let meta = self.meta_of(&root).await?.ok_or(VolumeError::Raced)?;
        let mut segments = Vec::new();
        match self.follow(&root, root.checkpoint.place, root.epoch + 1, &mut segments).await? {
            End::Absent(_) => Ok(Claimed { root, tag, meta, segments }),
            End::Sealed { .. } => Err(VolumeError::Raced),
        }
    }

    /// The history from a place on, up to the end, or to a seal that begins epoch `until` or a later one.
    async fn follow(&self, root: &Root, mut place: Place, until: u64, segments: &mut Vec<Segment>) -> Result<End, VolumeError> {
        let mut ahead = VecDeque::new();
        loop {
            match self.next_link(root, place, &mut ahead).await? {
                None => return Ok(End::Absent(place)),
                Some(Link::Seal { next }) if next >= until => return Ok(End::Sealed { next }),
                Some(Link::Seal { next }) if next > place.epoch => {
                    ahead.clear();
                    place = Place { epoch: next, sequence: 0 };
                }
                Some(Link::Seal { .. }) => {
                    let object = place.of(root.group).path();
                    return Err(VolumeError::ObjectDamaged { object, why: "it seals an epoch with an earlier one" });
                }
                Some(Link::Step(segment)) => {
                    segments.push(*segment);
                    place = place.next();
                }
            }
        }
    }

    /// The root as it is, and its version.
    pub(crate) async fn read_root(&self) -> Result<(Root, Tag), VolumeError> {
        self.root(&root_path(&self.group)).await?.ok_or(VolumeError::NoVolume)
    }

    /// The root, and what its checkpoint says.
    pub(crate) async fn read_meta(&self) -> Result<(Root, Meta), VolumeError> {
        loop {
            let (root, _) = self.read_root().await?;
            if let Some(meta) = self.meta_of(&root).await? {
                return Ok((root, meta));
            }
        }
    }

    /// The same for a clone: its ancestors are never deleted, but may say so until somebody who tries to sees that they have clones.
    pub(crate) async fn read_ancestor(&self) -> Result<Meta, VolumeError> {
        let name = root_path(&self.group);
        loop {
            let (bytes, _) = self.read_until_known(&name).await?.ok_or(VolumeError::NoVolume)?;
            let root = Root::decode(&bytes, &name)?;
            match self.meta_of(&root).await {
                Ok(Some(meta)) => return Ok(meta),
                Ok(None) | Err(VolumeError::NoVolume) => self.rest().await,
                Err(error) => return Err(error),
            }
        }
    }

    /// What the checkpoint of a root says. `None`: the root has changed meanwhile.
    async fn meta_of(&self, root: &Root) -> Result<Option<Meta>, VolumeError> {
        let source = root.meta();
        let mut pause = PAUSE_FIRST;
        loop {
            match self.store.read(&source.path(), 0..OBJECT_LEN_MAX).await {
                Ok(bytes) => return self.open_meta(root, &source, &bytes).map(Some),
                Err(StoreError::Absent(_)) => {
                    let (now, _) = self.read_root().await?;
                    let missing = VolumeError::ObjectDamaged { object: source.path(), why: "it is missing" };
                    return if now.checkpoint == root.checkpoint { Err(missing) } else { Ok(None) };
                }
                Err(StoreError::Unknown(_)) => self.pause(&mut pause).await,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Whose clone a volume is, as far as its checkpoint is still there.
    pub(crate) async fn parent_of(&self, root: &Root) -> Result<Option<Parent>, VolumeError> {
        let source = root.meta();
        let mut pause = PAUSE_FIRST;
        loop {
            match self.store.read(&source.path(), 0..OBJECT_LEN_MAX).await {
                Ok(bytes) => return Ok(self.open_meta(root, &source, &bytes)?.parent),
                Err(StoreError::Absent(_)) => return Ok(None),
                Err(StoreError::Unknown(_)) => self.pause(&mut pause).await,
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn open_meta(&self, root: &Root, source: &Source, bytes: &[u8]) -> Result<Meta, VolumeError> {
        let damaged = || VolumeError::ObjectDamaged { object: source.path(), why: "it is not what a checkpoint says" };
        match object::open(bytes, &self.secrets.sealer(root.domain), source)? {
            Object::Sealed { kind, inner, opened } if kind == object::Kind::Meta as u32 => {
                Meta::open(&inner, &opened.opener, &bytes[opened.body_at as usize..], source)
            }
            Object::Sealed { .. } | Object::Seal { .. } => Err(damaged()),
        }
    }

    /// Changes a root of one's own; `tag` is its version. The answer is its new version.
    pub(crate) async fn change_root(&self, root: &Root, tag: &Tag) -> Result<Tag, VolumeError> {
        let name = root_path(&self.group);
        let attempt = self.troubles.attempt();
        let mut pause = PAUSE_FIRST;
        loop {
            let error = match self.store.swap(&name, Some(tag), root.encode()).await {
                Ok(tag) => return Ok(tag),
                Err(error) => error,
            };
            let may_have_changed = matches!(error, StoreError::Changed(_) | StoreError::Unknown(_));
            attempt.failed(self.environment.now(), Cause::Pool(error));
            if may_have_changed {
                let (now, now_tag) = self.read_root().await?;
                match () {
                    () if now == *root && now_tag != *tag => return Ok(now_tag),
                    () if now_tag != *tag => return Err(VolumeError::Fenced),
                    () => {}
                }
            }
            self.pause(&mut pause).await;
        }
    }

    async fn claim_root(&self, (before, tag): (Root, Tag), log_id: LogId, is_local: bool) -> Result<(Root, Tag), VolumeError> {
        let name = root_path(&self.group);
        let owner = random_id(&*self.environment);
        let claimed = Root { epoch: before.epoch + 1, owner, log_id, is_local, ..before };
        let mut pause = PAUSE_FIRST;
        // Whoever was refused did not do it, even if its twin did, who draws the same random numbers.
        let mut may_be_ours = false;
        loop {
            match self.store.swap(&name, Some(&tag), claimed.encode()).await {
                Ok(tag) => return Ok((claimed, tag)),
                Err(error @ (StoreError::Changed(_) | StoreError::Unknown(_))) => {
                    may_be_ours |= matches!(error, StoreError::Unknown(_));
                    let (now, now_tag) = self.root(&name).await?.ok_or(VolumeError::NoVolume)?;
                    match () {
                        () if may_be_ours && now.owner == owner => return Ok((claimed, now_tag)),
                        () if now_tag != tag => return Err(VolumeError::Raced),
                        () => self.pause(&mut pause).await,
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn root(&self, name: &str) -> Result<Option<(Root, Tag)>, VolumeError> {
        let Some((bytes, tag)) = self.read_until_known(name).await? else { return Ok(None) };
        let root = Root::decode(&bytes, name)?;
        Ok((!root.is_deleted).then_some((root, tag)))
    }

    async fn seal(&self, root: &Root, place: Place) -> Result<(), VolumeError> {
        let source = place.of(root.group);
        let seal = object::encode_seal(&source, root.epoch);
        let mut pause = PAUSE_FIRST;
        match self.store.create(&source.path(), vec![seal]).await {
            Ok(()) | Err(StoreError::Exists(_)) => Ok(()),
            Err(StoreError::Unknown(_)) => {
                self.pause(&mut pause).await;
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// What stands at a place of the chain. Those after it are read along, as they are likely to be wanted next.
    async fn next_link(
        &self,
        root: &Root,
        place: Place,
        ahead: &mut VecDeque<Option<Link>>,
    ) -> Result<Option<Link>, VolumeError> {
        if let Some(link) = ahead.pop_front() {
            return Ok(link);
        }
        let places = (0..AHEAD).map(|steps| Place { epoch: place.epoch, sequence: place.sequence + steps });
        let read = futures_util::future::join_all(places.map(|place| self.read_link(root, place))).await;
        for link in read {
            let ends = !matches!(link, Ok(Some(Link::Step(_))));
            ahead.push_back(link?);
            if ends {
                break;
            }
        }
        Ok(ahead.pop_front().flatten())
    }

    /// What stands at a place of the chain.
    async fn read_link(&self, root: &Root, place: Place) -> Result<Option<Link>, VolumeError> {
        let sealer = self.secrets.sealer(root.domain);
        let source = place.of(root.group);
        let name = source.path();
        let mut len = HEADER_GUESS;
        let mut pause = PAUSE_FIRST;
        loop {
            match self.store.read(&name, 0..len).await {
                Ok(bytes) => match object::header_len(&bytes) {
                    Some(needed) if needed as u64 > len => len = needed as u64,
                    _ => return segment::decode(&bytes, &sealer, source).map(Some),
                },
                Err(StoreError::Absent(_)) => return Ok(None),
                Err(StoreError::Unknown(_)) => self.pause(&mut pause).await,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Stores an object of one's own, under a name of one's own epoch. It comes back only when the object is there, or never will be: a store that is full,
    /// refuses or does not answer is asked again, as whoever runs it may mend that.
    pub(crate) async fn publish(&self, source: &Source, header: &Bytes, body: &Bytes) -> Result<(), VolumeError> {
        self.put(source, header, body, |_| false).await
    }

    /// The same for somebody who waits for it: a store that is full or refuses is an error.
    pub(crate) async fn publish_or_fail(&self, source: &Source, header: &Bytes, body: &Bytes) -> Result<(), VolumeError> {
        self.put(source, header, body, |error| matches!(error, StoreError::NoSpace(_) | StoreError::Refused(_))).await
    }

    async fn put(
        &self,
        source: &Source,
        header: &Bytes,
        body: &Bytes,
        ends: impl Fn(&StoreError) -> bool,
    ) -> Result<(), VolumeError> {
        let name = source.path();
        let content = vec![header.clone(), body.clone()];
        let attempt = self.troubles.attempt();
        let mut pause = PAUSE_FIRST;
        loop {
            let mut error = match self.store.create(&name, content.clone()).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            if matches!(error, StoreError::Exists(_) | StoreError::Unknown(_)) {
                match self.store.read(&name, 0..header.len() as u64).await {
                    Ok(bytes) if bytes == header => return Ok(()),
                    Ok(_) => return Err(VolumeError::Fenced),
                    Err(StoreError::Absent(_)) => {}
                    Err(unread) => error = unread,
                }
            }
            if ends(&error) {
                return Err(error.into());
            }
            attempt.failed(self.environment.now(), Cause::Pool(error));
            self.pause(&mut pause).await;
        }
    }

    /// Removes objects that nothing refers to any more. What is not reached now is removed after the next checkpoint or opening.
    pub(crate) async fn remove(&self, sources: &[Source]) -> Vec<Source> {
        let mut left = Vec::new();
        for source in sources {
            if self.store.delete(&source.path()).await.is_err() {
                left.push(*source);
            }
        }
        left
    }

    /// A root and its version, however long the store takes to tell.
    pub(crate) async fn read_until_known(&self, name: &str) -> Result<Option<(Bytes, Tag)>, VolumeError> {
        let mut pause = PAUSE_FIRST;
        loop {
            match self.store.read_root(name).await {
                Ok(found) => return Ok(found),
                Err(StoreError::Unknown(_)) => self.pause(&mut pause).await,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// A moment until the next try.
    pub(crate) async fn rest(&self) {
        self.environment.sleep(PAUSE_FIRST).await;
    }

    async fn pause(&self, pause: &mut Duration) {
        self.environment.sleep(*pause).await;
        *pause = (*pause * 2).min(PAUSE_MAX);
    }
}
