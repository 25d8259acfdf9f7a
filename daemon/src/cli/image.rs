//! `novastor image`: this process opens the file; the daemon opens the volume and serves it on a private socket.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::Context;
use super::arguments::{Image, ImageFormat, Usage};
use super::copying::Copying;
use super::interrupt;
use super::transfer::Transfer;
use crate::api::types::{JobState, Status, TransferCreate, VolumeCreate, VolumeInfo};
use crate::client::{Client, encode};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{self, Disk, Format, OpenError, Pass, Record, Source, Volume};
use crate::quoting;
use crate::units::{format_size, now_unix};

/// The size of a new volume is a multiple of this.
const SECTOR: u64 = 512;
/// The size of a new volume is a multiple of it, whatever its layout.
const BLOCK: u64 = 4096;
/// One step of looking for data in a volume.
const SCAN: u64 = 1 << 20;

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    direction: &'static str,
    file: String,
    volume: String,
    format: Format,
    /// Of the disk, in bytes.
    size: u64,
    /// Bytes of data that were copied; the rest is holes, or was there already.
    written: u64,
    /// Where an interrupted copy was taken up again.
    resumed_from: Option<u64>,
    verified: bool,
    job: String,
    seconds: u64,
}

pub fn run(context: &Context, command: Image) -> anyhow::Result<()> {
    interrupt::listen()?;
    let report = match command {
        Image::Import { file, volume, format, pool, verify, claim, consent } => {
            Import { context, file, volume, pool, verify, takes_over: claim.take_over, yes: consent.yes }
                .run(format.map(Format::from))?
        }
        Image::Export { volume, file, format, verify, claim, consent } => {
            let format = format.map_or_else(|| Format::by_name(&file), Format::from);
            Export { context, file, volume, verify, takes_over: claim.take_over, yes: consent.yes }.run(format)?
        }
    };
    context.output.print(&report, |report| {
        let (size, data, format) = (format_size(report.size), format_size(report.written), report.format.name());
        let checked = if report.verified { ", compared and equal" } else { "" };
        let (from, to) = match report.direction {
            "import" => (format!("{} ({format}, {size})", report.file), report.volume.clone()),
            _ => (report.volume.clone(), format!("{} ({format}, {size})", report.file)),
        };
        format!("{from} copied to {to}: {data} of data in {} s{checked}", report.seconds)
    })
}

impl From<ImageFormat> for Format {
    fn from(format: ImageFormat) -> Format {
        match format {
            ImageFormat::Raw => Format::Raw,
            ImageFormat::Qcow2 => Format::Qcow2,
            ImageFormat::Vmdk => Format::Vmdk,
        }
    }
}

struct Import<'a> {
    context: &'a Context,
    file: PathBuf,
    volume: String,
    pool: Option<String>,
    verify: bool,
    takes_over: bool,
    yes: bool,
}

impl Import<'_> {
    fn run(self, format: Option<Format>) -> anyhow::Result<Report> {
        let (began, client) = (now_unix(), self.context.client()?);
        let image = image::open(&self.file, format).map_err(|error| self.not_opened(&client, error))?;
        let size = image.disk.size().next_multiple_of(SECTOR);
        if size == 0 {
            return Err(Error::invalid(format!("image {}: it is empty", self.file.display())).into());
        }
        let source = Source::of_file(&image.file)?;
        let (volume, is_new) = self.volume(&client, size)?;
        let name = format!("{}/{}", volume.pool, volume.name);
        if volume.size < size {
            let (has, needs) = (format_size(volume.size), format_size(size));
            return Err(Error::invalid(format!(
                "volume {name}: import refused: it is {has}, the image is {needs}; `novastor volume resize {name} {size}` first"
            ))
            .into());
        }
        let transfer = begin(self.context, &name, ("import", self.takes_over), &self.file, volume.size)?;
        let copied = self.copy(&image, source, &name, &volume.uuid, is_new, &transfer);
        let report = copied.map(|copied| Report {
            direction: "import",
            file: self.file.display().to_string(),
            volume: name,
            format: image.format,
            size: image.disk.size(),
            written: copied.written,
            resumed_from: copied.resumed_from,
            verified: self.verify,
            job: transfer.info.job.clone(),
            seconds: now_unix().saturating_sub(began),
        });
        conclude(transfer, report)
    }

    fn copy(
        &self,
        image: &image::Opened,
        source: Source,
        name: &str,
        uuid: &str,
        is_new: bool,
        transfer: &Transfer,
    ) -> anyhow::Result<Copied> {
        let target = connect(name, transfer)?;
        let record_path = image::state_folder().map(|folder| folder.join(format!("import-{uuid}.json")));
        let earlier = record_path.as_deref().and_then(Record::load);
        let earlier = earlier.filter(|earlier| earlier.is_of(&source, image.format, target.size()));
        let resumed_from = earlier.map(|earlier| earlier.position);
        let pass = match resumed_from {
            Some(position) => {
                let at = format_size(position);
                let question =
                    format!("The import into volume {name} is resumed at {at}: it replaces all that was written since.");
                self.context.output.confirm(self.yes, &question)?;
                Pass::Write
            }
            None if is_new || is_empty(&target)? => Pass::WriteNew,
            None => {
                let question = format!("Volume {name} is not empty: the import replaces all of it.");
                self.context.output.confirm(self.yes, &question)?;
                Pass::Write
            }
        };
        let record = Record { source, format: image.format, size: target.size(), position: 0, closed: false };
        let job = Copying {
            context: self.context,
            what: format!("importing {}", self.file.display()),
            source: &*image.disk,
            target: &target,
            pass,
            record,
            record_path,
            resumed_from,
            verify: self.verify,
        };
        Ok(Copied { written: job.run(transfer)?, resumed_from })
    }

    /// The volume, made if there is none.
    fn volume(&self, client: &Client, size: u64) -> Result<(VolumeInfo, bool)> {
        let wanted = match &self.pool {
            Some(pool) if !self.volume.contains('/') => format!("{pool}/{}", self.volume),
            _ => self.volume.clone(),
        };
        match client.get(&format!("/v1/volumes/{}", encode(&wanted))) {
            Ok(volume) => Ok((volume, false)),
            Err(error) if error.kind == ErrorKind::NotFound => {
                let request = VolumeCreate {
                    name: self.volume.clone(),
                    size: size.next_multiple_of(BLOCK),
                    pool: self.pool.clone(),
                    layout: None,
                    block_size: None,
                    policy: None,
                    tenant: None,
                    for_import: true,
                };
                Ok((client.post("/v1/volumes", &request)?, true))
            }
            Err(error) => Err(error),
        }
    }

    /// Says how else an image gets into a volume, where it does.
    fn not_opened(&self, client: &Client, error: OpenError) -> Error {
        let file = self.file.display();
        match error {
            OpenError::Io(error) => Error::io(format!("image {file}"), &error),
            OpenError::Refused(why) => Error::invalid(format!("image {file}: {why}")),
            OpenError::Elsewhere { format, why } => {
                let uri = nbd_uri(client, &self.volume);
                Error::unsupported(format!(
                    "image {file}: {why}; once volume {0} exists and is exported (`novastor volume create {0} --size SIZE`, \
                     `novastor export add {0} --nbd`), copy it with: qemu-img convert -p -n -f {format} -O raw {1} '{uri}'",
                    quoting::shell(&self.volume),
                    quoting::shell(&file.to_string())
                ))
            }
        }
    }
}

struct Export<'a> {
    context: &'a Context,
    file: PathBuf,
    volume: String,
    verify: bool,
    takes_over: bool,
    yes: bool,
}

impl Export<'_> {
    fn run(self, format: Format) -> anyhow::Result<Report> {
        let (began, client, output) = (now_unix(), self.context.client()?, self.context.output);
        if format == Format::Vmdk {
            let (uri, file) = (nbd_uri(&client, &self.volume), self.file.display());
            return Err(Error::unsupported(format!(
                "image {file}: vmdk images are not written here; export the volume (`novastor export add {} --nbd --read-only`) \
                 and copy it with: qemu-img convert -p -O vmdk '{uri}' {}",
                quoting::shell(&self.volume),
                quoting::shell(&file.to_string())
            ))
            .into());
        }
        self.check_target()?;
        let (name, snapshot) = match self.volume.split_once('@') {
            Some((name, snapshot)) => (name, Some(snapshot.to_owned())),
            None => (self.volume.as_str(), None),
        };
        let volume: VolumeInfo = client.get(&format!("/v1/volumes/{}", encode(name)))?;
        if snapshot.is_none() && !volume.exports.is_empty() && !output.quiet && !output.json {
            eprintln!(
                "novastor: note: {name} is exported; what is written to it meanwhile may be in the image or not. A snapshot is one point in time."
            );
        }
        let full =
            snapshot.iter().fold(format!("{}/{}", volume.pool, volume.name), |name, snapshot| format!("{name}@{snapshot}"));
        let transfer = begin(self.context, &full, ("export", self.takes_over), &self.file, volume.size)?;
        let size = transfer.info.size;
        let copied = self.copy(format, Source::Volume { uuid: volume.uuid, snapshot }, &full, &transfer);
        let report = copied.map(|copied| Report {
            direction: "export",
            file: self.file.display().to_string(),
            volume: full,
            format,
            size,
            written: copied.written,
            resumed_from: copied.resumed_from,
            verified: self.verify,
            job: transfer.info.job.clone(),
            seconds: now_unix().saturating_sub(began),
        });
        conclude(transfer, report)
    }

    fn copy(&self, format: Format, source: Source, full: &str, transfer: &Transfer) -> anyhow::Result<Copied> {
        let source_disk = connect(full, transfer)?;
        let size = source_disk.size();
        let (part, record_path) = (beside(&self.file, ".novastor-part"), beside(&self.file, ".novastor-part.json"));
        let earlier = Record::load(&record_path).filter(|earlier| part.is_file() && earlier.is_of(&source, format, size));
        // imago keeps what it knows of an image in memory until it is closed: half a qcow2 image is none.
        let earlier = earlier.filter(|earlier| earlier.closed || format == Format::Raw);
        let resumed_from = earlier.map(|earlier| earlier.position);
        let target = image::create(&part, &self.file.display().to_string(), format, size, resumed_from.is_some());
        let target = target.map_err(|error| Error::new(ErrorKind::Io, format!("image {}: {error}", part.display())))?;
        let job = Copying {
            context: self.context,
            what: format!("exporting {full}"),
            source: &source_disk,
            target: &*target,
            pass: if resumed_from.is_some() { Pass::Write } else { Pass::WriteNew },
            record: Record { source, format, size, position: 0, closed: false },
            record_path: Some(record_path),
            resumed_from,
            verify: self.verify,
        };
        let written = job.run(transfer)?;
        drop(target);
        let named = fs::rename(&part, &self.file);
        named.map_err(|error| Error::io(format!("image {}: naming it", self.file.display()), &error))?;
        Ok(Copied { written, resumed_from })
    }

    fn check_target(&self) -> anyhow::Result<()> {
        let shown = self.file.display();
        if self.file.file_name().is_none() {
            return Err(Usage(format!("{shown} names no file")).into());
        }
        match fs::symlink_metadata(&self.file) {
            Err(_) => Ok(()),
            Ok(metadata) if metadata.is_file() => {
                self.context.output.confirm(self.yes, &format!("File {shown} exists: the export replaces it."))
            }
            Ok(_) => Err(Error::exists(format!(
                "image {shown}: what is there is no plain file; name a new file, or copy with qemu-img convert"
            ))
            .into()),
        }
    }
}

/// What came of a copy.
struct Copied {
    written: u64,
    resumed_from: Option<u64>,
}

/// Tells the daemon.
fn conclude(transfer: Transfer, result: anyhow::Result<Report>) -> anyhow::Result<Report> {
    let (state, error) = match &result {
        Ok(_) => (JobState::Done, None),
        Err(error) if error.downcast_ref::<Error>().is_some_and(|error| error.kind == ErrorKind::Cancelled) => {
            (JobState::Interrupted, Some(error.to_string()))
        }
        Err(error) => (JobState::Failed, Some(error.to_string())),
    };
    transfer.end(state, error);
    result
}

fn beside(file: &Path, suffix: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

fn nbd_uri(client: &Client, volume: &str) -> String {
    let name = volume.split_once('/').map_or(volume, |(_, name)| name);
    let status: Option<Status> = client.get("/v1/status").ok();
    let socket = status.and_then(|status| status.nbd.iter().find_map(|address| address.strip_prefix("unix:").map(str::to_owned)));
    quoting::nbd_unix_uri(name, Path::new(socket.as_deref().unwrap_or("/run/novastor/nbd.sock")))
}

fn begin(context: &Context, volume: &str, (direction, take_over): (&str, bool), file: &Path, total: u64) -> Result<Transfer> {
    let (volume, direction, file) = (volume.to_owned(), direction.to_owned(), file.display().to_string());
    Transfer::begin(context.client()?, &TransferCreate { volume, direction, file, total, take_over })
}

fn connect(name: &str, transfer: &Transfer) -> Result<Volume> {
    let socket = Path::new(&transfer.info.socket);
    Volume::connect(&format!("volume {name}"), socket, &transfer.info.export).map_err(|error| {
        let what = format!("volume {name}: {} (images are copied on the daemon's own host, as its user)", socket.display());
        Error::io(what, &error)
    })
}

/// Whether the disk reads as zeroes everywhere.
fn is_empty(disk: &dyn Disk) -> Result<bool> {
    let failed = |error: &std::io::Error| Error::io(format!("{}: looking for data", disk.name()), error);
    let mut at = 0;
    let mut buffer = vec![0; SCAN as usize];
    while at < disk.size() {
        if interrupt::asked() {
            return Err(Error::new(ErrorKind::Cancelled, format!("{}: interrupted before anything was written", disk.name())));
        }
        for run in disk.runs(at, disk.size() - at).map_err(|error| failed(&error))? {
            let end = at + run.len;
            while !run.zero && at < end {
                let part = &mut buffer[..(end - at).min(SCAN) as usize];
                disk.read(at, part).map_err(|error| failed(&error))?;
                if !image::is_zero(part) {
                    return Ok(false);
                }
                at += part.len() as u64;
            }
            at = end;
        }
    }
    Ok(true)
}
