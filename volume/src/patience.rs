//! Reading for work that is not given up while the store is away: checkpoints and collections.

use std::rc::Rc;
use std::time::Duration;

use crate::core::Core;
use crate::environment::LocalFuture;
use crate::error::VolumeError;
use crate::map::{Page, Pages, Pointer};
use crate::troubles::Cause;

const PAUSE: Duration = Duration::from_secs(1);

impl Core {
    /// Reads until the store answers, or the volume goes on no more.
    pub(crate) async fn patiently<T>(&self, mut read: impl AsyncFnMut() -> Result<T, VolumeError>) -> Result<T, VolumeError> {
        let attempt = self.chain.troubles.attempt();
        loop {
            match read().await {
                Err(VolumeError::Store(error)) if self.failed_errno().is_none() => {
                    attempt.failed(self.chain.environment.now(), Cause::Pool(error));
                    self.chain.environment.sleep(PAUSE).await;
                }
                done => return done,
            }
        }
    }
}

/// Pages of a volume, read so.
pub(crate) struct PatientPages<'a> {
    pub(crate) core: &'a Core,
    pub(crate) pages: &'a dyn Pages,
}

impl Pages for PatientPages<'_> {
    fn page(&self, pointer: Pointer) -> LocalFuture<'_, Result<Rc<Page>, VolumeError>> {
        Box::pin(self.core.patiently(async move || self.pages.page(pointer).await))
    }

    fn expect<'a>(&'a self, next: &'a [Pointer]) -> LocalFuture<'a, ()> {
        self.pages.expect(next)
    }
}
