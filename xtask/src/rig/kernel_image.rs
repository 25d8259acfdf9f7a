//! Takes the ELF kernel out of a compressed x86 kernel image, so that QEMU boots it through PVH, some seconds
//! sooner than through the boot loader's protocol.
//!
//! ```text
//!   0x1f1  setup sectors ─┐
//!   0x248  payload offset ├─▶ (setup sectors + 1) × 512 + offset ─▶ payload (xz, gzip or zstd of an ELF file)
//!   0x24c  payload length ┘
//! ```

use anyhow::{Context, Result, bail};
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

const SECTOR: usize = 512;
const SETUP_SECTORS: usize = 0x1f1;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const DEFAULT_SETUP_SECTORS: usize = 4;
const ELF_MAGIC: &[u8] = b"\x7fELF";

pub fn extract(image: &Path, target: &Path) -> Result<()> {
    let bytes = fs::read(image).with_context(|| format!("reading {}", image.display()))?;
    let payload = payload(&bytes).with_context(|| format!("{} is no x86 kernel image", image.display()))?;
    let kernel = decompress(payload)?;
    if !kernel.starts_with(ELF_MAGIC) {
        bail!("{} holds no ELF kernel", image.display());
    }
    fs::write(target, kernel).with_context(|| format!("writing {}", target.display()))
}

fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?) as usize);
    let setup = match *image.get(SETUP_SECTORS)? {
        0 => DEFAULT_SETUP_SECTORS,
        sectors => usize::from(sectors),
    };
    let start = ((setup + 1) * SECTOR).checked_add(word(PAYLOAD_OFFSET)?)?;
    image.get(start..start.checked_add(word(PAYLOAD_LENGTH)?)?)
}

fn decompress(payload: &[u8]) -> Result<Vec<u8>> {
    let program = match payload {
        [0xfd, b'7', b'z', b'X', ..] => "xz",
        [0x1f, 0x8b, ..] => "gzip",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        _ => bail!("the kernel is compressed in a way we do not know: {:02x?}", payload.get(..6)),
    };
    let mut command = Command::new(program);
    command.args(["--decompress", "--stdout"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().with_context(|| format!("starting {program}"))?;
    let mut input = child.stdin.take().context("no input to write to")?;
    let output = std::thread::scope(|scope| {
        // The payload's last four bytes are its length: the program takes them for trailing garbage, which
        // is why its status and a broken pipe mean nothing; the caller checks what came out.
        scope.spawn(move || input.write_all(payload));
        child.wait_with_output()
    });
    Ok(output.with_context(|| format!("reading from {program}"))?.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_image_is_refused() {
        assert_eq!(payload(b"short"), None);
        let mut image = vec![0; 8 * SECTOR];
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(payload(&image), None);
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&3u32.to_le_bytes());
        assert_eq!(payload(&image).map(<[u8]>::len), Some(3));
        assert!(decompress(&[0, 0, 0]).is_err());
    }
}
