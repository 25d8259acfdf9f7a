//! Pages for somebody who goes through whole maps: what lies around a page in its object is read with it.
//!
//! ```text
//!   pages that are next ─▶ stretches of objects, read side by side ─▶ the pages' frames, unpacked on other threads ─▶ all pages in them
//! ```
//!
//! A version of a map has its pages in the order of the map, so whoever goes through several versions side by side goes through each object from
//! front to back. The pages that others look at stay in the reader's cache meanwhile.

use std::cell::RefCell;
use std::num::NonZeroUsize;
use std::rc::Rc;
use std::sync::Arc;

use dedup::location::Location;
use futures_util::future::join_all;
use lru::LruCache;

use crate::environment::{LocalFuture, offload};
use crate::error::VolumeError;
use crate::map::{Page, Pages, Pointer};
use crate::pages::FramePages;
use crate::reader::Reader;
use crate::stored::{Stored, offset_of, with_frames};

/// Bytes of stretches that are kept.
const STRETCHES_BYTES: usize = 16 << 20;
const STRETCH_MIN: usize = 16 << 10;
const STRETCH_MAX: usize = 64 << 10;
/// Stretches kept for each version: the pages of one may be in several objects by turns.
const STRETCHES_PER_VERSION: usize = 2;
/// Frames whose pages are kept.
const FRAMES_MAX: NonZeroUsize = NonZeroUsize::new(1024).unwrap();
/// Frames that another thread unpacks in one go.
const UNPACKED_AT_ONCE: usize = 16;

pub(crate) struct Ahead<'a> {
    reader: &'a Reader,
    stretch_len: usize,
    /// By handle, and by number in its object.
    stretches: RefCell<LruCache<(u32, usize), Arc<Stored>>>,
    /// By handle and unit.
    frames: RefCell<LruCache<(u32, u32), Rc<FramePages>>>,
    /// What is kept by handle stays right.
    _looking: Rc<()>,
}

impl<'a> Ahead<'a> {
    /// For so many versions of a map, gone through side by side.
    pub(crate) fn new(reader: &'a Reader, versions: usize) -> Ahead<'a> {
        let stretch_len = STRETCHES_BYTES / (versions.max(1) * STRETCHES_PER_VERSION);
        let stretch_len = stretch_len.clamp(STRETCH_MIN, STRETCH_MAX).next_power_of_two();
        let stretches = NonZeroUsize::new(STRETCHES_BYTES / stretch_len).expect("a stretch is shorter");
        Ahead {
            reader,
            stretch_len,
            stretches: LruCache::new(stretches).into(),
            frames: LruCache::new(FRAMES_MAX).into(),
            _looking: reader.looking(),
        }
    }

    fn stretch(&self, location: Location) -> (u32, usize) {
        (location.segment.get(), offset_of(location) / self.stretch_len)
    }

    /// The stretch that a page's frame is in, if it is all there.
    fn found(&self, location: Location) -> Option<Arc<Stored>> {
        let mut stretches = self.stretches.borrow_mut();
        stretches.get(&self.stretch(location)).filter(|stored| stored.has_frame(location)).cloned()
    }

    async fn read(&self, pointer: Pointer) -> Result<(Location, Arc<Stored>), VolumeError> {
        let (location, stored) = self.reader.fetch_around(pointer, self.stretch_len).await?;
        let stored = Arc::new(stored);
        self.stretches.borrow_mut().put(self.stretch(location), stored.clone());
        Ok((location, stored))
    }

    /// Where pages are whose frames are not unpacked yet, one for each frame.
    async fn packed(&self, pointers: &[Pointer]) -> Vec<(Location, Pointer)> {
        let mut packed: Vec<(Location, Pointer)> = Vec::new();
        for pointer in pointers {
            let Some(location) = pointer.location() else { continue };
            let Ok(location) = self.reader.resolve(location).await else { continue };
            if !self.frames.borrow().contains(&frame(location)) {
                packed.push((location, *pointer));
            }
        }
        packed.sort_unstable_by_key(|(location, _)| frame(*location));
        packed.dedup_by_key(|(location, _)| frame(*location));
        packed
    }

    async fn read_and_unpack(&self, next: &[Pointer]) {
        let packed = self.packed(next).await;
        let is_missing = |(location, _): &&(Location, Pointer)| self.found(*location).is_none();
        let mut missing: Vec<(Location, Pointer)> = packed.iter().filter(is_missing).copied().collect();
        missing.dedup_by_key(|(location, _)| self.stretch(*location));
        join_all(missing.into_iter().map(|(_, pointer)| self.read(pointer))).await;
        let stored = |(location, _): &(Location, Pointer)| Some((*location, self.found(*location)?));
        let stored: Vec<(Location, Arc<Stored>)> = packed.iter().filter_map(stored).collect();
        // One alone is unpacked when it is looked at.
        if stored.len() > 1 {
            join_all(stored.chunks(UNPACKED_AT_ONCE).map(|part| self.unpack(part.to_vec()))).await;
        }
    }

    async fn unpack(&self, stored: Vec<(Location, Arc<Stored>)>) {
        let unpacking = move || -> Vec<(Location, Vec<Option<Page>>)> {
            with_frames(|frames| {
                let mut pages = |(location, stored): (Location, Arc<Stored>)| {
                    let blocks = stored.blocks(&[(0, location)], frames).ok()?;
                    Some((location, blocks.iter().map(Page::decode).collect()))
                };
                stored.into_iter().filter_map(&mut pages).collect()
            })
        };
        let unpacked = offload(&*self.reader.chain.environment, unpacking).await;
        for (location, pages) in unpacked.into_iter().flatten() {
            self.frames.borrow_mut().put(frame(location), Rc::new(pages.into()));
        }
    }

    async fn look(&self, pointer: Pointer) -> Result<Rc<Page>, VolumeError> {
        let Some(location) = pointer.location() else { return self.reader.page(pointer).await };
        let location = self.reader.resolve(location).await?;
        let known = self.frames.borrow_mut().get(&frame(location)).cloned();
        if let Some(page) = known.and_then(|pages| pages.page(location)) {
            return Ok(page);
        }
        let (location, stored) = match self.found(location) {
            Some(stored) => (location, stored),
            None => self.read(pointer).await?,
        };
        match self.reader.pages_of(&stored, location) {
            Ok((page, pages)) => {
                self.frames.borrow_mut().put(frame(location), Rc::new(pages));
                Ok(page)
            }
            Err(error) => {
                self.stretches.borrow_mut().pop(&self.stretch(location));
                Err(error)
            }
        }
    }
}

fn frame(location: Location) -> (u32, u32) {
    (location.segment.get(), location.spot.unit())
}

impl Pages for Ahead<'_> {
    fn page(&self, pointer: Pointer) -> LocalFuture<'_, Result<Rc<Page>, VolumeError>> {
        Box::pin(self.look(pointer))
    }

    fn expect<'a>(&'a self, next: &'a [Pointer]) -> LocalFuture<'a, ()> {
        Box::pin(self.read_and_unpack(next))
    }
}
