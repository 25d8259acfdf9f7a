//! Ctrl-C during long work: the first asks it to end in good order, the second ends the process.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::signal::unix::{SignalKind, signal};

static ASKED: AtomicBool = AtomicBool::new(false);
/// What a shell reports of a command ended by SIGINT.
pub const STATUS: i32 = 130;

/// True once the user asked to end.
pub fn asked() -> bool {
    ASKED.load(Ordering::SeqCst)
}

/// Begins to listen for SIGINT and SIGTERM.
pub fn listen() -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        runtime.block_on(async {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if ASKED.swap(true, Ordering::SeqCst) {
                    std::process::exit(STATUS);
                }
            }
        });
    })?;
    Ok(())
}
