//! Pages of the map, as a reader of the volume sees them.
//!
//! ```text
//!   pointer ─▶ fresh: not in the store yet ─▶ cache ─▶ frame in the store, of which all pages are kept
//! ```

use std::rc::Rc;

use dedup::location::{Location, Spot};

use crate::environment::LocalFuture;
use crate::error::VolumeError;
use crate::map::{Page, Pages, Pointer};
use crate::reader::Reader;
use crate::stored::Stored;

/// The blocks of a frame, of which some may be no pages.
pub(crate) struct FramePages(Vec<Option<Rc<Page>>>);

impl From<Vec<Option<Page>>> for FramePages {
    fn from(pages: Vec<Option<Page>>) -> FramePages {
        FramePages(pages.into_iter().map(|page| page.map(Rc::new)).collect())
    }
}

impl FramePages {
    pub(crate) fn page(&self, location: Location) -> Option<Rc<Page>> {
        self.0.get(usize::from(location.spot.block())).cloned().flatten()
    }

    /// All but one, and where they are.
    fn neighbours(self, location: Location) -> impl Iterator<Item = (Spot, Rc<Page>)> {
        let spots = (0..).map(move |number| Spot::new(location.spot.unit(), number, location.spot.class()));
        let all = spots.zip(self.0).filter_map(|(spot, page)| spot.zip(page));
        all.filter(move |(spot, _)| *spot != location.spot)
    }
}

fn no_page() -> VolumeError {
    VolumeError::ObjectDamaged { object: "a page of the volume's map".into(), why: "it is no page" }
}

impl Reader {
    /// A page that can be read before it is in the store.
    pub(crate) fn add_fresh(&self, pointer: Pointer, page: Page) {
        self.fresh.borrow_mut().insert(pointer, Rc::new(page));
    }

    /// How many of them there are.
    #[cfg(test)]
    pub(crate) fn fresh_pages(&self) -> usize {
        self.fresh.borrow().len()
    }

    /// All pages are in the store now.
    pub(crate) fn settle_fresh(&self) {
        let fresh = std::mem::take(&mut *self.fresh.borrow_mut());
        fresh.into_iter().for_each(|(pointer, page)| self.cache_page(pointer, page));
    }

    async fn read_page(&self, pointer: Pointer) -> Result<Rc<Page>, VolumeError> {
        if let Some(page) = self.fresh.borrow().get(&pointer) {
            return Ok(page.clone());
        }
        if let Some(page) = self.cache.borrow_mut().as_mut().and_then(|cache| cache.get(&pointer)) {
            return Ok(page.clone());
        }
        let _looking = self.looking();
        let stored = self.fetch(&[(0, pointer)]).await?;
        let found = stored.first().and_then(|stored| Some((stored, stored.wanted.first()?.1)));
        let (stored, location) = found.ok_or_else(no_page)?;
        let (page, pages) = self.pages_of(stored, location)?;
        // Its neighbours in the tree are in the same frame, and likely to be next.
        if Pointer::to(location) == pointer {
            for (spot, neighbour) in pages.neighbours(location) {
                self.cache_page(Pointer::to(Location { spot, ..location }), neighbour);
            }
        }
        self.cache_page(pointer, page.clone());
        Ok(page)
    }

    /// A page, and all pages of the frame that it is in.
    pub(crate) fn pages_of(&self, stored: &Stored, location: Location) -> Result<(Rc<Page>, FramePages), VolumeError> {
        let mut frames = self.frames.borrow_mut();
        let blocks = stored.blocks(&[(0, location)], &mut frames).map_err(|damaged| self.damaged_frame(damaged))?;
        let pages = FramePages::from(blocks.iter().map(Page::decode).collect::<Vec<_>>());
        Ok((pages.page(location).ok_or_else(no_page)?, pages))
    }

    fn cache_page(&self, pointer: Pointer, page: Rc<Page>) {
        if let Some(cache) = &mut *self.cache.borrow_mut() {
            cache.put(pointer, page);
        }
    }
}

impl Pages for Reader {
    fn page(&self, pointer: Pointer) -> LocalFuture<'_, Result<Rc<Page>, VolumeError>> {
        Box::pin(self.read_page(pointer))
    }
}
