//! `novastor serve`: start, run until told to end, drain.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, anyhow};
use blockdev::DataPlane;
use blockdev::reactor::DataPlaneOptions;
use parking_lot::RwLock;
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};

use super::data_dir::DataDir;
use super::jobs::Jobs;
use super::joint_snapshots::JointSnapshots;
use super::known_pools::KnownPools;
use super::listeners::Listeners;
use super::log::LogControl;
use super::mapped::Host;
use super::pools::Pools;
use super::systemd;
use super::{Daemon, process};
use crate::api;
use crate::config::{self, Address, Config};
use crate::exports::{Exports, NbdFrontEnd};
use crate::units::now_unix;

/// How long start waits for pools and exports that do not answer, before it says `ready` without them.
const START_PATIENCE: Duration = Duration::from_secs(2);
/// How long the end waits for what the control plane is still doing.
const END_PATIENCE: Duration = Duration::from_secs(10);

static STOPPING: AtomicBool = AtomicBool::new(false);

impl Daemon {
    /// True once the end has begun.
    pub fn is_stopping(&self) -> bool {
        STOPPING.load(Ordering::SeqCst)
    }

    /// Everything that this daemon listens on, or will when what is served there can be opened.
    fn listening_addresses(&self) -> Vec<Address> {
        let config = self.config();
        let daemon = &config.daemon;
        let metrics = daemon.metrics.iter().filter_map(|metrics| config::address::tcp(metrics).ok());
        let named = daemon.nbd_addresses().unwrap_or_default().into_iter().chain(daemon.admin_address());
        named.chain(metrics).chain(self.exports.addresses()).collect()
    }
}

/// Runs the daemon until SIGTERM or SIGINT, on what was passed to it with `listeners`. `data_dir`: of `config`, if it is open already.
/// `announce` is called when exports accept.
pub fn serve(
    config: Config,
    config_file: Option<PathBuf>,
    data_dir: Option<DataDir>,
    listeners: Listeners,
    announce: impl FnOnce(&Arc<Daemon>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let log = LogControl::start(&config.log)?;
    process::prepare();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("control")
        .enable_all()
        .build()
        .context("starting the control plane")?;
    let daemon = runtime.block_on(async { build(config, config_file, data_dir, log, listeners) })?;
    let outcome = runtime.block_on(run(daemon.clone(), announce));
    STOPPING.store(true, Ordering::SeqCst);
    daemon.listeners.end();
    systemd::notify(&[NotifyState::Stopping]);
    tracing::info!("stopping: requests in flight are finished first");
    daemon.exports.nbd().stop_accepting();
    daemon.stop_transfers();
    daemon.exports.stop_all();
    daemon.exports.nbd().stop();
    for (id, _) in daemon.open.list() {
        let _ = daemon.open.wait_closed(&id);
    }
    drop(daemon);
    runtime.shutdown_timeout(END_PATIENCE);
    tracing::info!("stopped");
    outcome
}

fn build(
    config: Config,
    config_file: Option<PathBuf>,
    data_dir: Option<DataDir>,
    log: LogControl,
    listeners: Listeners,
) -> anyhow::Result<Arc<Daemon>> {
    let listeners = Arc::new(listeners);
    let data_dir = Arc::new(data_dir.map_or_else(|| DataDir::open(&config.daemon.data_dir), Ok)?);
    let options = DataPlaneOptions { threads: config.daemon.threads, spin_max: Duration::from_micros(config.daemon.spin_us) };
    let plane = DataPlane::start(options)
        .map_err(|error| anyhow!("io_uring is not available ({error}): `novastor doctor` says why and what to do"))?;
    let live = Arc::new(RwLock::new(Arc::new(config)));
    let config = live.read().clone();
    let pools = Arc::new(Pools::new(Host {
        data_dir: data_dir.path().to_owned(),
        known: KnownPools::load(data_dir.clone())?,
        config: live.clone(),
        reactors: plane.handles().to_vec(),
        runtime: tokio::runtime::Handle::current(),
    }));
    for (name, pool) in &config.pool {
        pools.add(name, pool);
    }
    let nbd = NbdFrontEnd::new(&config, plane.handles(), listeners.clone())?;
    let jobs = Jobs::restore(data_dir.clone())?;
    let joint_snapshots = JointSnapshots::load(data_dir.clone())?;
    let exports = Exports::load(data_dir.clone(), nbd)?;
    Ok(Arc::new_cyclic(|this| Daemon {
        this: this.clone(),
        jobs,
        joint_snapshots,
        exports,
        config: live,
        config_file,
        data_dir,
        listeners,
        pools,
        open: Arc::default(),
        transfers: Default::default(),
        locks: Default::default(),
        metrics_address: Default::default(),
        kek_ids: super::keys::kek_ids(&config).into(),
        started: now_unix(),
        log,
        plane,
    }))
}

async fn run(daemon: Arc<Daemon>, announce: impl FnOnce(&Arc<Daemon>) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let restoring = daemon.clone();
    let restored = tokio::task::spawn_blocking(move || {
        restoring.exports.declare(&restoring.config())?;
        restoring.listeners.keep_only(&restoring.listening_addresses());
        restoring.take_back_cut_off(START_PATIENCE);
        let deadline = blockdev::clock::monotonic() + START_PATIENCE;
        Exports::start_missing(&restoring, START_PATIENCE);
        restoring.pools.wait_settled(deadline.saturating_duration_since(blockdev::clock::monotonic()));
        crate::error::Result::Ok(())
    });
    tokio::select! {
        restored = restored => restored.context("restoring the exports")??,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    }
    daemon.exports.nbd().listen(&daemon.config())?;
    let servers = api::server::start(&daemon)?;
    daemon.listeners.close_unused();
    announce(&daemon)?;
    systemd::notify(&[NotifyState::Ready]);
    let background = [
        tokio::spawn(Exports::keep_trying(daemon.clone())),
        tokio::spawn(daemon.clone().watch_volumes()),
        tokio::spawn(systemd::feed_watchdog(daemon.plane.handles().to_vec())),
    ];
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            () = reload_when_told(&daemon, &mut hangup) => {}
        }
    }
    daemon.listeners.end();
    background.iter().for_each(|task| task.abort());
    servers.stop().await;
    std::thread::spawn(|| end_on_second_signal(terminate, interrupt));
    Ok(())
}

/// Whoever asks twice does not want to wait.
fn end_on_second_signal(mut terminate: tokio::signal::unix::Signal, mut interrupt: tokio::signal::unix::Signal) {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().build() else { return };
    runtime.block_on(async {
        tokio::select! {
            Some(()) = terminate.recv() => {}
            Some(()) = interrupt.recv() => {}
            else => return,
        }
        tracing::warn!("ended at once: requests in flight were not waited for");
        std::process::exit(1);
    });
}

/// Given up when the daemon is told to end meanwhile: no export is started any more then.
async fn reload_when_told(daemon: &Arc<Daemon>, hangup: &mut tokio::signal::unix::Signal) {
    hangup.recv().await;
    reload(daemon).await;
}

async fn reload(daemon: &Arc<Daemon>) {
    systemd::notify_reloading();
    let reloading = daemon.clone();
    match tokio::task::spawn_blocking(move || reloading.reload()).await {
        Ok(Ok(report)) => {
            for change in &report.changed {
                tracing::info!("reloaded: {change}");
            }
            for key in &report.needs_restart {
                tracing::warn!("reloaded: {key} takes effect when the daemon is restarted");
            }
            for problem in &report.problems {
                tracing::warn!("reloaded: {problem}");
            }
        }
        Ok(Err(error)) => tracing::error!("the configuration was not reloaded:\n{error}"),
        Err(error) => tracing::error!("the configuration was not reloaded: {error}"),
    }
    systemd::notify(&[NotifyState::Ready]);
}

/// The configuration for `serve`: the file named, or the default one.
pub fn load_config(file: Option<&std::path::Path>) -> anyhow::Result<(Config, PathBuf)> {
    let file = file.map_or_else(|| PathBuf::from(config::DEFAULT_FILE), std::path::Path::to_owned);
    let file = std::path::absolute(&file)?;
    let config = config::load(Some(&file))?;
    Ok((config, file))
}
