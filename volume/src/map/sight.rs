//! Looking at pages of which some cannot be read.
//!
//! ```text
//!   node ─▶ hidden? ─▶ the page that hides it, higher up ─▶ down again, as far as pages can be read ─▶ stored, nothing, or still hidden
//! ```
//!
//! A page that could not be read once is not tried again by the same look.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use crate::error::VolumeError;
use crate::map::tree::{Node, blocks_under};
use crate::map::{FANOUT, Page, Pages, Pointer};

/// What a node that is no block leads to.
pub(super) enum Under {
    /// All of it is a hole, or zeroes.
    Nothing(Pointer),
    Page(Rc<Page>),
    /// What the pointers of the page are that cannot be read.
    Hidden(Pointer),
}

impl Under {
    pub(super) fn into_page(self) -> Page {
        match self {
            Under::Page(page) => (*page).clone(),
            Under::Nothing(pointer) | Under::Hidden(pointer) => Page::filled(pointer),
        }
    }
}

pub(super) struct Sight<'a> {
    pages: &'a dyn Pages,
    unreadable: RefCell<BTreeMap<Pointer, VolumeError>>,
}

impl<'a> Sight<'a> {
    pub(super) fn new(pages: &'a dyn Pages) -> Sight<'a> {
        Sight { pages, unreadable: RefCell::default() }
    }

    /// Pages that could not be read, and why.
    pub(super) fn into_unreadable(self) -> BTreeMap<Pointer, VolumeError> {
        self.unreadable.into_inner()
    }

    /// The page of a stored pointer, or why it is damaged.
    async fn page(&self, pointer: Pointer) -> Result<Result<Rc<Page>, VolumeError>, VolumeError> {
        if let Some(error) = self.unreadable.borrow().get(&pointer) {
            return Ok(Err(error.clone()));
        }
        match self.pages.page(pointer).await {
            Err(error @ VolumeError::ObjectDamaged { .. }) => {
                self.unreadable.borrow_mut().insert(pointer, error.clone());
                Ok(Err(error))
            }
            page => page.map(Ok),
        }
    }

    /// The pointer of a node, or the one that it stands for if it is hidden and can be seen now.
    pub(super) async fn revealed(&self, node: Node) -> Result<Pointer, VolumeError> {
        let Node { mut pointer, mut level, first } = node;
        loop {
            if let Some((page, above)) = pointer.hiding() {
                (pointer, level) = (page, level + 1 + above);
            }
            if level == node.level || pointer.is_nothing() {
                return Ok(pointer);
            }
            match self.page(pointer).await? {
                Ok(page) => {
                    level -= 1;
                    pointer = page.pointers()[(first / blocks_under(level)) as usize % FANOUT];
                }
                Err(error) => return Pointer::hidden_by(pointer, level - node.level - 1).ok_or(error),
            }
        }
    }

    pub(super) async fn under(&self, node: Node) -> Result<Under, VolumeError> {
        let pointer = self.revealed(node).await?;
        if pointer.is_nothing() {
            return Ok(Under::Nothing(pointer));
        }
        let (page, above) = match pointer.hiding() {
            Some((page, above)) => (page, above + 1),
            None => match self.page(pointer).await? {
                Ok(page) => return Ok(Under::Page(page)),
                Err(_) => (pointer, 0),
            },
        };
        Pointer::hidden_by(page, above).map(Under::Hidden).ok_or_else(|| self.unreadable.borrow()[&page].clone())
    }
}
