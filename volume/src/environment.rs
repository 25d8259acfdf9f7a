//! What the engine takes from the world besides its disk and its store: time, randomness and tasks. The simulator has its own.

use std::future::Future;
use std::pin::Pin;
use std::sync::mpsc;
use std::time::Duration;

/// A future that stays on its thread.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// Time, randomness and tasks of one process.
pub trait Environment {
    /// Time since some fixed moment; never goes back.
    fn now(&self) -> Duration;

    /// Completes no sooner than after `duration`.
    fn sleep(&self, duration: Duration) -> LocalFuture<'static, ()>;

    /// Fills `bytes` with unpredictable bytes.
    fn random(&self, bytes: &mut [u8]);

    /// Runs a task beside the caller, on the same thread, to its end.
    fn spawn(&self, task: LocalFuture<'static, ()>);

    /// Does work that takes long on another thread. Completes when it is done.
    fn offload(&self, work: Box<dyn FnOnce() + Send>) -> LocalFuture<'static, ()>;
}

/// Does work that takes long on another thread, and gives what it gave; `None` if it panicked.
pub(crate) async fn offload<T: Send + 'static>(
    environment: &dyn Environment,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (sender, receiver) = mpsc::sync_channel(1);
    // The receiver lives until the work is done.
    environment.offload(Box::new(move || drop(sender.send(work())))).await;
    receiver.try_recv().ok()
}

/// Sixteen unpredictable bytes: a name nobody else has.
pub(crate) fn random_id(environment: &dyn Environment) -> [u8; 16] {
    let mut id = [0; 16];
    environment.random(&mut id);
    id
}
