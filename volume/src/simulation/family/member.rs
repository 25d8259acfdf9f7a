//! A volume of a family, as the model knows it.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::names::Group;
use crate::simulation::client::SharedHistory;
use crate::simulation::contents::{Contents, Version};
use crate::simulation::disk::HostDisk;
use crate::simulation::history::{History, Kept};
use crate::simulation::new_disk;
use crate::simulation::world::{ProcessId, Random, World};

/// Whether a volume is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Presence {
    /// It was asked for, and may be there.
    Asked,
    There,
    /// Its deletion was asked for.
    Doomed,
    Gone,
}

/// Where a clone comes from.
pub struct Origin {
    pub parent: Rc<Member>,
    pub snapshot: String,
}

pub struct Member {
    pub group: Group,
    pub disk: HostDisk,
    pub history: SharedHistory,
    pub kept: Cell<Kept>,
    pub presence: Cell<Presence>,
    pub origin: Option<Origin>,
    /// It may need its origin no more.
    pub is_loose: Cell<bool>,
    /// Somebody tried to delete it in this round, which takes it from whoever serves it.
    pub is_contested: Cell<bool>,
    /// How often somebody began to delete it, and who is at it.
    pub deletions: Cell<u64>,
    pub deleters: RefCell<Vec<ProcessId>>,
}

impl Member {
    pub fn new(world: &Rc<World>, group: Group, contents: &Contents, first: Vec<Version>, origin: Option<Origin>) -> Member {
        Member {
            group,
            disk: new_disk(world),
            history: Rc::new(RefCell::new(History::new(contents, first))),
            kept: Cell::new(Kept::Acknowledged),
            presence: Cell::new(Presence::Asked),
            origin,
            is_loose: Cell::new(false),
            is_contested: Cell::new(false),
            deletions: Cell::new(0),
            deleters: RefCell::default(),
        }
    }

    /// It is there, and stays for the time being.
    pub fn is_there(&self) -> bool {
        self.presence.get() == Presence::There
    }

    /// Nothing but a defect keeps it from being served.
    pub fn must_go_on(&self) -> bool {
        self.is_there() && !self.is_contested.get()
    }

    /// One deletion of that process has come to its end.
    pub fn is_deleted_no_more_by(&self, process: ProcessId) {
        let mut deleters = self.deleters.borrow_mut();
        if let Some(at) = deleters.iter().position(|deleter| *deleter == process) {
            deleters.swap_remove(at);
        }
    }

    fn comes_from(&self, parent: &Member, snapshot: Option<&str>) -> bool {
        let is_it = |origin: &Origin| origin.parent.group == parent.group && snapshot.is_none_or(|name| name == origin.snapshot);
        self.origin.as_ref().is_some_and(is_it)
    }
}

/// All volumes that ever were.
#[derive(Clone, Default)]
pub struct Members(Rc<RefCell<Vec<Rc<Member>>>>);

impl Members {
    pub fn add(&self, member: Member) -> Rc<Member> {
        let member = Rc::new(member);
        self.0.borrow_mut().push(member.clone());
        member
    }

    pub fn all(&self) -> Vec<Rc<Member>> {
        self.0.borrow().clone()
    }

    pub fn there(&self) -> usize {
        self.all().iter().filter(|member| member.is_there()).count()
    }

    pub fn any(&self, random: &Random) -> Option<Rc<Member>> {
        let there: Vec<Rc<Member>> = self.all().into_iter().filter(|member| member.is_there()).collect();
        there.get(random.below(there.len().max(1) as u64) as usize).cloned()
    }

    /// A clone that certainly keeps a snapshot of `parent`, or a certain one of them, from going away.
    pub fn pins(&self, parent: &Member, snapshot: Option<&str>) -> Option<Rc<Member>> {
        self.all().into_iter().find(|member| member.comes_from(parent, snapshot) && member.is_there() && !member.is_loose.get())
    }

    /// Whether any clone may do that.
    pub fn may_pin(&self, parent: &Member, snapshot: Option<&str>) -> bool {
        self.all().iter().any(|member| member.comes_from(parent, snapshot) && member.presence.get() != Presence::Gone)
    }

    /// Some volume without clones.
    pub fn any_leaf(&self, random: &Random) -> Option<Rc<Member>> {
        let is_leaf = |member: &Rc<Member>| member.presence.get() != Presence::Gone && !self.may_pin(member, None);
        let leaves: Vec<Rc<Member>> = self.all().into_iter().filter(is_leaf).collect();
        leaves.get(random.below(leaves.len().max(1) as u64) as usize).cloned()
    }
}
