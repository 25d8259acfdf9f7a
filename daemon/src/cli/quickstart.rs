//! `novastor quickstart`: a daemon for an ordinary user, with everything under one folder, and the lines to use it.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Context;
use super::arguments::Quickstart;
use super::output;
use super::paste::{self, Line, WithLines};
use crate::api::types::{ExportCreate, ExportInfo, Protocol, VolumeCreate};
use crate::config::address::{Address, SOCKET_PATH_MAX};
use crate::config::{self, Config};
use crate::daemon::data_dir::{DataDir, replace_file};
use crate::daemon::listeners::Listeners;
use crate::daemon::{Daemon, serve};
use crate::error::ErrorKind;
use crate::quoting;

const VOLUME: &str = "local/demo";
const NBD_PORT: u16 = 10809;
const PORTS_TRIED: u16 = 100;
/// Room for the longest socket name in the folder of sockets.
const LONGEST_SOCKET: usize = "/transfer-1000000.sock".len();

pub fn run(context: &Context, command: &Quickstart) -> anyhow::Result<()> {
    let folder = std::path::absolute(&command.folder)?;
    let sockets = socket_folder(&folder)?;
    for made in [&folder, &folder.join("pool"), &sockets] {
        std::fs::create_dir_all(made).map_err(|error| anyhow::anyhow!("{}: {error}", made.display()))?;
    }
    // Before anything is written: the folder may be that of one that runs.
    let data = folder.join("data");
    let locked = DataDir::open(&data)?;
    let file = folder.join("novastor.toml");
    let (listener, port) = listen_on_free_port()?;
    replace_file(&file, configuration(&folder, &sockets, port).as_bytes())?;
    let config: Config = config::load(Some(&file))?;
    let vhost_user = sockets.join("demo.sock");
    let (size, quiet) = (command.size, context.output.quiet);
    let listeners = Listeners::default();
    listeners.add(&Address::Tcp { host: "127.0.0.1".to_owned(), port }, listener.into());
    // The environment may say another one.
    let (data_dir, _also_locked) = if config.daemon.data_dir == data { (Some(locked), None) } else { (None, Some(locked)) };
    serve::serve(config, Some(file.clone()), data_dir, listeners, move |daemon| {
        let exports = prepare(daemon, size, &vhost_user)?;
        if !quiet {
            output::line(&welcome(daemon, &file, exports))?;
        }
        output::ready()
    })
}

/// The folder itself where its path is short enough for sockets; else one under the user's runtime folder.
fn socket_folder(folder: &Path) -> anyhow::Result<PathBuf> {
    let inside = folder.join("run");
    if inside.as_os_str().len() + LONGEST_SOCKET <= SOCKET_PATH_MAX {
        return Ok(inside);
    }
    let user = rustix::process::getuid().as_raw();
    let base = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|base| base.is_dir());
    let base = base.unwrap_or_else(|| format!("/tmp/novastor-{user}").into());
    std::fs::create_dir_all(&base)?;
    let metadata = std::fs::metadata(&base)?;
    use std::os::unix::fs::MetadataExt;
    if metadata.uid() != user || metadata.mode() & 0o022 != 0 {
        anyhow::bail!("{} could be changed by others: choose another --folder with a short path", base.display());
    }
    // One folder of sockets for each folder of data.
    let tag = folder
        .as_os_str()
        .as_encoded_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3));
    Ok(base.join(format!("novastor-{tag:016x}")))
}

/// On the NBD port, or the next that nobody listens on.
fn listen_on_free_port() -> anyhow::Result<(TcpListener, u16)> {
    let mut ports = NBD_PORT..NBD_PORT + PORTS_TRIED;
    ports
        .find_map(|port| Some((TcpListener::bind(("127.0.0.1", port)).ok()?, port)))
        .ok_or_else(|| anyhow::anyhow!("ports {NBD_PORT} to {} are all taken", NBD_PORT + PORTS_TRIED - 1))
}

fn configuration(folder: &Path, sockets: &Path, port: u16) -> String {
    let quoted = |path: PathBuf| toml::Value::String(path.display().to_string()).to_string();
    let address = |name: &str| toml::Value::String(format!("unix:{}", sockets.join(name).display())).to_string();
    format!(
        "# Written anew by each `novastor quickstart`; start from `novastor config example` for one of your own.\n\
         [daemon]\ndata_dir = {}\nadmin = {}\nnbd = [{}, \"tcp:127.0.0.1:{port}\"]\n\n\
         [pool.local]\ndriver = \"file\"\npath = {}\n",
        quoted(folder.join("data")),
        address("admin.sock"),
        address("nbd.sock"),
        quoted(folder.join("pool")),
    )
}

/// The volume and its exports; what is there from an earlier run is kept.
fn prepare(daemon: &Arc<Daemon>, size: u64, vhost_user: &Path) -> anyhow::Result<Vec<ExportInfo>> {
    let volume = VolumeCreate {
        name: VOLUME.to_owned(),
        size,
        pool: None,
        layout: None,
        block_size: None,
        policy: None,
        tenant: None,
        for_import: false,
    };
    let export = |protocol, address| ExportCreate {
        volume: VOLUME.to_owned(),
        protocol,
        address,
        queues: None,
        read_only: false,
        mode: None,
        group: None,
        tls_allow: Vec::new(),
        accept_loss: false,
    };
    let wanted = [export(Protocol::Nbd, None), export(Protocol::VhostUser, Some(format!("unix:{}", vhost_user.display())))];
    // Control work blocks, and this is called from the runtime.
    tokio::task::block_in_place(|| {
        match daemon.create_volume(&volume) {
            Err(error) if error.kind != ErrorKind::Exists => return Err(error.into()),
            _ => {}
        }
        for request in wanted {
            let present = daemon.exports().list().into_iter().any(|export| {
                export.volume == VOLUME && export.protocol == request.protocol && export.address == request.address
            });
            if !present {
                daemon.exports().add(daemon, request)?;
            }
        }
        Ok(daemon.exports().list().into_iter().filter(|export| export.volume == VOLUME).collect())
    })
}

fn welcome(daemon: &Daemon, file: &Path, exports: Vec<ExportInfo>) -> String {
    let uri = exports.iter().flat_map(|export| export.uris.iter()).find(|uri| uri.starts_with("nbd+unix:")).cloned();
    let admin = quoting::shell(&daemon.config().daemon.admin);
    let mut lines: Vec<Line> = exports.into_iter().flat_map(|export| WithLines::new(export).lines).collect();
    if let Some(uri) = uri {
        lines.push(Line {
            tool: "fio".to_owned(),
            text: format!(
                "fio --name=demo --ioengine=nbd --uri='{uri}' --rw=randread --bs=4k --iodepth=32 --size=1G \\\n\
                 --time_based --runtime=10"
            ),
        });
    }
    format!(
        "novastor serves the volume `demo`. Configuration: {}\n\n{}\n\n# another terminal\nexport NOVASTOR_ADMIN={admin}\n\
         novastor export list\n\nCtrl-C ends it; the volume stays, and the same command serves it again.\n",
        file.display(),
        paste::text(&lines)
    )
}
