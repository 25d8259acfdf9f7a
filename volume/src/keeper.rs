//! The root of a volume in the hands of its owner, who alone changes it.

use std::cell::{Cell, RefCell};

use backends::segments::Tag;

use crate::chain::Chain;
use crate::error::VolumeError;
use crate::root::Root;
use crate::signal::Lock;

pub(crate) struct Keeper {
    chain: Chain,
    root: Cell<Root>,
    tag: RefCell<Tag>,
    changing: Lock,
}

impl Keeper {
    pub(crate) fn new(chain: Chain, root: Root, tag: Tag) -> Keeper {
        Keeper { chain, root: Cell::new(root), tag: RefCell::new(tag), changing: Lock::default() }
    }

    /// As it was last known to be in the store.
    pub(crate) fn root(&self) -> Root {
        self.root.get()
    }

    /// Changes the root. When it comes back the change is in the store, or the volume is no longer ours.
    pub(crate) async fn change(&self, edit: impl FnOnce(&mut Root)) -> Result<(), VolumeError> {
        let _alone = self.changing.hold().await;
        let mut root = self.root.get();
        edit(&mut root);
        let before = self.tag.borrow().clone();
        let tag = self.chain.change_root(&root, &before).await?;
        self.tag.replace(tag);
        self.root.set(root);
        Ok(())
    }
}
