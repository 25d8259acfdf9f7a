//! Which format an image has, and how it is opened and made.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use imago::file::File as ImagoFile;
use imago::format::gate::ImplicitOpenGate;
use imago::qcow2::Qcow2;
use imago::vmdk::Vmdk;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, StorageOpenOptions};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::disk::Disk;
use super::imago_disk::Imago;
use super::raw::Raw;
use super::whole::Whole;

/// A format that is read, and but for vmdk written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    Raw,
    Qcow2,
    Vmdk,
}

/// Why an image cannot be read here.
#[derive(Error, Debug)]
pub enum OpenError {
    #[error(transparent)]
    Io(#[from] io::Error),
    /// qemu-img can read it: as this format, and that is why.
    #[error("{why}")]
    Elsewhere { format: &'static str, why: String },
    /// Nothing can, as it is.
    #[error("{0}")]
    Refused(String),
}

/// An image to read from.
pub struct Opened {
    pub disk: Box<dyn Disk>,
    pub format: Format,
    /// The very file, to recognise it by.
    pub file: File,
}

impl Format {
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Vmdk => "vmdk",
        }
    }

    /// As the name of a new image tells.
    pub fn by_name(path: &Path) -> Format {
        match path.extension().and_then(|extension| extension.to_str()).map(str::to_ascii_lowercase).as_deref() {
            Some("qcow2" | "qcow") => Format::Qcow2,
            Some("vmdk") => Format::Vmdk,
            _ => Format::Raw,
        }
    }
}

/// Formats known by what they begin with, with the name qemu-img has for them.
const OTHERS: [(u64, &[u8], &str); 10] = [
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"QED\0", "qed"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"LUKS\xba\xbe", "luks"),
];

/// Files that hold an image, packed.
const PACKED: [(&[u8], &str); 4] =
    [(b"\x1f\x8b\x08", "gzip -dk"), (b"\xfd7zXZ\0", "xz -dk"), (b"\x28\xb5\x2f\xfd", "zstd -dk"), (b"BZh", "bzip2 -dk")];

/// Opens the image at `path` for reading; without `format` it is told from its first bytes.
pub fn open(path: &Path, format: Option<Format>) -> Result<Opened, OpenError> {
    let name = path.display().to_string();
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let kind = file.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(OpenError::Refused("it is neither a file nor a block device".to_owned()));
    }
    let format = match format {
        Some(format) => format,
        None => probe(&file, &name)?,
    };
    let own = file.try_clone()?;
    let disk: Box<dyn Disk> = match format {
        Format::Raw => Box::new(Raw::open(file, &name)?),
        Format::Qcow2 => Box::new(open_qcow2(file, &name)?),
        Format::Vmdk => Box::new(open_vmdk(file, path, &name)?),
    };
    Ok(Opened { disk, format, file: own })
}

fn probe(file: &File, name: &str) -> Result<Format, OpenError> {
    let mut head = [0; 512];
    let mut held = 0;
    while held < head.len() {
        match file.read_at(&mut head[held..], held as u64)? {
            0 => break,
            read => held += read,
        }
    }
    let head = &head[..held];
    let begins = |at: u64, magic: &[u8]| head.get(at as usize..).is_some_and(|rest| rest.starts_with(magic));
    if begins(0, b"QFI\xfb") {
        return Ok(Format::Qcow2);
    }
    if begins(0, b"# Disk DescriptorFile") {
        return Ok(Format::Vmdk);
    }
    if let Some((_, _, format)) = OTHERS.iter().find(|(at, magic, _)| begins(*at, magic)) {
        return Err(OpenError::Elsewhere { format, why: format!("images of format {format} are not read here") });
    }
    if let Some((_, unpack)) = PACKED.iter().find(|(magic, _)| begins(0, magic)) {
        return Err(OpenError::Refused(format!("it is packed: `{unpack} {name}` first, or say --format raw")));
    }
    match Format::by_name(Path::new(name)) {
        Format::Raw => Ok(Format::Raw),
        named => Err(OpenError::Refused(format!(
            "it is named like a {} image and does not begin like one: get a whole copy of it, or say --format raw",
            named.name()
        ))),
    }
}

fn elsewhere(format: &'static str, why: impl Into<String>) -> OpenError {
    OpenError::Elsewhere { format, why: why.into() }
}

fn open_qcow2(file: File, name: &str) -> Result<Imago<Whole>, OpenError> {
    let mut method = [0; 4];
    file.read_exact_at(&mut method, 32).map_err(|error| match error.kind() {
        ErrorKind::UnexpectedEof => OpenError::Refused("the file ends within its header".to_owned()),
        _ => error.into(),
    })?;
    if u32::from_be_bytes(method) != 0 {
        return Err(elsewhere("qcow2", "it is encrypted"));
    }
    let own = file.try_clone()?;
    let opened = Qcow2::<Whole>::open_image(Whole(ImagoFile::try_from(file)?), false);
    let mut image = opened.map_err(|error| elsewhere("qcow2", error.to_string()))?;
    if let Some(backing) = image.implicit_backing_file() {
        return Err(elsewhere(
            "qcow2",
            format!("it stands on the backing file {backing:?}, and no file is opened that was not named"),
        ));
    }
    if image.requires_external_data_file() {
        return Err(elsewhere("qcow2", "its data is in another file, and no file is opened that was not named"));
    }
    image.set_backing(None::<FormatAccess<Whole>>);
    Ok(Imago::new(image, own, name))
}

fn open_vmdk(file: File, path: &Path, name: &str) -> Result<Imago<Whole>, OpenError> {
    let own = file.try_clone()?;
    let storage = Whole(ImagoFile::from_open_file(file, StorageOpenOptions::new().filename(path))?);
    let opened = Vmdk::<Whole>::builder(storage).open(SameFolder(path.parent().unwrap_or(Path::new("")).to_owned()));
    Ok(Imago::new(opened.map_err(|error| elsewhere("vmdk", error.to_string()))?, own, name))
}

/// Opens the extents that a vmdk descriptor names, if they lie beside it.
struct SameFolder(PathBuf);

impl ImplicitOpenGate<Whole> for SameFolder {
    fn open_format<F: FormatDriverBuilder<Whole>>(&mut self, builder: F) -> io::Result<FormatAccess<Whole>> {
        DenyImplicitOpenGate::default().open_format(builder)
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<Whole> {
        let denied = |why: &str| io::Error::new(ErrorKind::PermissionDenied, why.to_owned());
        let path = options.get_filename().filter(|path| path.file_name().is_some() && path.parent() == Some(&self.0));
        let path = path.ok_or_else(|| denied("an extent outside the image's folder"))?;
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
        if !file.metadata()?.is_file() {
            return Err(denied("an extent that is no plain file"));
        }
        Ok(Whole(ImagoFile::try_from(file)?))
    }
}

/// Makes a new image at `path`, or opens one that an interrupted copy left there.
pub fn create(path: &Path, name: &str, format: Format, size: u64, resume: bool) -> Result<Box<dyn Disk>, OpenError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(!resume).custom_flags(libc::O_NOFOLLOW);
    let file = options.open(path)?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| OpenError::Refused("another export writes it".to_owned()))?;
    if !resume {
        file.set_len(0)?;
    }
    match (format, resume) {
        (Format::Raw, false) => Ok(Box::new(Raw::create(file, name, size)?)),
        (Format::Raw, true) => Ok(Box::new(Raw::open(file, name)?)),
        (Format::Qcow2, resume) => {
            let own = file.try_clone()?;
            let storage = ImagoFile::from_open_file(file, StorageOpenOptions::new().write(true))?;
            let image = if resume {
                Qcow2::<ImagoFile>::builder(storage).write(true).backing(None).open(DenyImplicitOpenGate::default())?
            } else {
                let builder = |storage| Ok(Qcow2::<ImagoFile>::builder(storage).backing(None));
                Qcow2::<ImagoFile>::create_builder(storage).size(size).create_open(DenyImplicitOpenGate::default(), builder)?
            };
            Ok(Box::new(Imago::new(image, own, name)))
        }
        (Format::Vmdk, _) => Err(elsewhere("vmdk", "vmdk images are not written here")),
    }
}
