//! Pages for somebody who is in no hurry, and lets others go first now and then.

use std::cell::Cell;
use std::rc::Rc;

use crate::environment::LocalFuture;
use crate::error::VolumeError;
use crate::map::{Page, Pages, Pointer};
use crate::signal::give_way;

/// Pages looked at in one go.
const AT_ONCE: u32 = 16;

pub(crate) struct Unhurried<'a> {
    pages: &'a dyn Pages,
    in_a_row: Cell<u32>,
}

impl<'a> Unhurried<'a> {
    pub(crate) fn new(pages: &'a dyn Pages) -> Unhurried<'a> {
        Unhurried { pages, in_a_row: Cell::new(0) }
    }
}

impl Pages for Unhurried<'_> {
    fn page(&self, pointer: Pointer) -> LocalFuture<'_, Result<Rc<Page>, VolumeError>> {
        Box::pin(async move {
            self.in_a_row.set(self.in_a_row.get() + 1);
            if self.in_a_row.get() == AT_ONCE {
                self.in_a_row.set(0);
                give_way().await;
            }
            self.pages.page(pointer).await
        })
    }

    fn expect<'a>(&'a self, next: &'a [Pointer]) -> LocalFuture<'a, ()> {
        self.pages.expect(next)
    }
}
