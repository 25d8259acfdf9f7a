//! A log on any block device, such as a local file.

use std::cell::RefCell;
use std::rc::Rc;

use blockdev::{
    BlockDevice, Buffer, BufferPool, Completion, CompletionQueue, DeviceError, Errno, ExtentKind, Handler, HandlerId, IoQueue,
    Memory, Op, Payload, Reactor, Request,
};
use bytes::Bytes;
use slab::Slab;

use crate::disk::LogDisk;
use crate::environment::LocalFuture;
use crate::signal::{Asked, Signal, answer};

const BUFFERS: usize = 128 << 20;
const BUFFERS_IDLE: usize = 16 << 20;
const SECTOR_MIN: u32 = 512;
/// Looked through at once for where a hole ends.
const LOOK_LEN: u64 = 64 << 20;

/// One thread's way to the device of a log.
pub(super) struct DeviceLog {
    inner: Rc<Inner>,
}

struct Inner {
    queue: Box<dyn IoQueue>,
    reactor: Rc<Reactor>,
    id: HandlerId,
    completions: Rc<CompletionQueue>,
    waiting: RefCell<Slab<Asked<Completion>>>,
    came_back: Signal,
    buffers: Rc<BufferPool>,
    buffer_came_back: Rc<Signal>,
    len: u64,
    sector: usize,
    tells_holes: bool,
}

impl DeviceLog {
    pub(super) fn open(device: &dyn BlockDevice, reactor: &Rc<Reactor>) -> Result<DeviceLog, DeviceError> {
        let geometry = device.geometry();
        let queue = device.open_queue(reactor)?;
        let inner = reactor.install(|id| Inner {
            queue,
            reactor: reactor.clone(),
            id,
            completions: CompletionQueue::new(reactor, id, 64),
            waiting: RefCell::default(),
            came_back: Signal::default(),
            buffers: BufferPool::new(BUFFERS, BUFFERS_IDLE),
            buffer_came_back: Rc::default(),
            len: geometry.size,
            sector: geometry.block_size.max(SECTOR_MIN) as usize,
            tells_holes: device.capabilities().block_status,
        });
        Ok(DeviceLog { inner })
    }
}

impl DeviceLog {
    /// Waits until no operation is under way.
    pub(super) async fn idle(&self) {
        self.inner.idle().await;
    }
}

impl Drop for DeviceLog {
    fn drop(&mut self) {
        self.inner.reactor.unregister(self.inner.id);
    }
}

impl Inner {
    async fn idle(&self) {
        self.came_back.wait_for(|| self.waiting.borrow().is_empty().then_some(())).await;
    }

    async fn run(&self, op: Op, offset: u64, len: usize, payload: Payload) -> Result<Payload, Errno> {
        let (asked, answer) = answer();
        let token = self.waiting.borrow_mut().insert(asked) as u64;
        let request = Request::new(op, offset, len as u64, payload, self.reactor.now(), &self.completions, token);
        self.queue.submit(request);
        let completion = answer.get().await;
        completion.result.map(|()| completion.payload)
    }

    async fn buffer(&self, len: usize) -> Buffer {
        let buffer = || {
            let buffer = self.buffers.try_get(len);
            if buffer.is_none() {
                let came_back = self.buffer_came_back.clone();
                self.buffers.on_free(Box::new(move || came_back.notify()));
            }
            buffer
        };
        self.buffer_came_back.wait_for(buffer).await
    }
}

impl LogDisk for DeviceLog {
    fn len(&self) -> u64 {
        self.inner.len
    }

    fn sector_size(&self) -> usize {
        self.inner.sector
    }

    fn read(&self, offset: u64, len: usize) -> LocalFuture<'_, Result<Vec<u8>, Errno>> {
        Box::pin(async move {
            let memory = Memory::from_buffer(self.inner.buffer(len).await, len);
            let payload = self.inner.run(Op::Read, offset, len, Payload::Memory(memory)).await?;
            let mut bytes = vec![0; len];
            payload.memory().ok_or(Errno::EIO)?.copy_to(0, &mut bytes);
            Ok(bytes)
        })
    }

    fn next_data(&self, offset: u64) -> LocalFuture<'_, Result<u64, Errno>> {
        Box::pin(async move {
            let mut at = offset;
            while self.inner.tells_holes && at < self.inner.len {
                let len = LOOK_LEN.min(self.inner.len - at);
                let found = self.inner.run(Op::BlockStatus, at, len as usize, Payload::None).await?;
                let Payload::Extents(extents) = found else { break };
                let empty: u64 =
                    extents.iter().take_while(|extent| extent.kind != ExtentKind::Data).map(|extent| extent.len).sum();
                at += empty;
                if empty < len {
                    break;
                }
            }
            Ok(at)
        })
    }

    fn write(&self, offset: u64, parts: Vec<Bytes>) -> LocalFuture<'_, Result<(), Errno>> {
        Box::pin(async move {
            let len = parts.iter().map(Bytes::len).sum();
            let mut memory = Memory::from_buffer(self.inner.buffer(len).await, len);
            let mut at = 0;
            for part in parts {
                memory.copy_from(at, &part);
                at += part.len();
            }
            self.inner.run(Op::Write { fua: false }, offset, len, Payload::Memory(memory)).await.map(drop)
        })
    }

    fn sync(&self) -> LocalFuture<'_, Result<(), Errno>> {
        Box::pin(async move { self.inner.run(Op::Flush, 0, 0, Payload::None).await.map(drop) })
    }
}

impl Handler for Inner {
    fn completed(&self, _token: u32, _result: i32, _flags: u32) {}

    fn ready(&self) {
        while let Some(completion) = self.completions.pop() {
            let asked = self.waiting.borrow_mut().try_remove(completion.token as usize);
            if let Some(asked) = asked {
                asked.give(completion);
            }
        }
        self.came_back.notify();
    }
}
