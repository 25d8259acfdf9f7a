//! Proves the guest rig with qemu-storage-daemon as the peer: what fails here is the rig, not novastor.

use anyhow::{Context, Result, ensure};
use novastor_tests::rig::deadline::Deadline;
use novastor_tests::rig::guest::{Guest, GuestSpec, Memory};
use novastor_tests::rig::hugepages::HugePages;
use novastor_tests::rig::process::Running;
use novastor_tests::rig::{scratch, tools};
use serde_json::json;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(180);
const NOBODY: u32 = 65534;

#[test]
fn a_guest_that_keeps_silent_is_described() -> Result<()> {
    let peer = Peer::start(64)?;
    let mut guest = Guest::start(&GuestSpec::new("await").vhost_user_disk("disk0", &peer.socket, 1))?;
    guest.wait_ready()?;
    let error = guest.wait_mark("never", Duration::from_secs(1)).expect_err("nobody marks it");
    let told = format!("{error:#}");
    for expected in ["no mark never", "running", "RIP=", "qemu-system", "qemu-storage"] {
        ensure!(told.contains(expected), "{expected:?} is not in {told}");
    }
    guest.kill().map(drop)
}

/// A disk served by qemu-storage-daemon over vhost-user.
struct Peer {
    server: Running,
    socket: PathBuf,
    image: PathBuf,
    _folder: TempDir,
}

impl Peer {
    fn start(size_mib: u64) -> Result<Self> {
        let folder = scratch::short_dir()?;
        let (socket, image) = (folder.path().join("disk.sock"), folder.path().join("disk.raw"));
        File::create(&image)?.set_len(size_mib << 20)?;
        let server = Self::serve(&image, &socket)?;
        Ok(Self { server, socket, image, _folder: folder })
    }

    fn serve(image: &Path, socket: &Path) -> Result<Running> {
        let mut command = Command::new(tools::require("qemu-storage-daemon")?);
        let file = format!("driver=file,node-name=file,filename={},discard=unmap", image.display());
        let address = format!("addr.type=unix,addr.path={}", socket.display());
        command.args(["--blockdev", &file]);
        command.args(["--blockdev", "driver=raw,node-name=disk,file=file,discard=unmap"]);
        command.arg("--export");
        command.arg(format!("vhost-user-blk,id=e0,node-name=disk,{address},writable=on,num-queues=2"));
        let mut server = Running::spawn("qemu-storage-daemon", &mut command)?;
        let deadline = Deadline::after(LIMIT);
        while !socket.exists() {
            ensure!(server.has_ended()?.is_none(), "qemu-storage-daemon ended");
            ensure!(deadline.pause(), "qemu-storage-daemon made no socket");
        }
        Ok(server)
    }

    fn restart(&mut self) -> Result<()> {
        self.server.kill()?;
        fs::remove_file(&self.socket)?;
        self.server = Self::serve(&self.image, &self.socket)?;
        Ok(())
    }
}

#[test]
fn host_and_guest_take_turns_under_verified_load() -> Result<()> {
    let mut peer = Peer::start(64)?;
    let spec = GuestSpec::new(
        "await begin
         fio --name=verify --filename=/dev/vda --rw=randwrite --bs=4k --iodepth=16 --ioengine=libaio --direct=1 \
             --size=8M --verify=crc32c --do_verify=1 --verify_fatal=1
         printf 'guest was here' | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null
         mark written $(blockdev --getsize64 /dev/vda)
         await restarted
         dd if=/dev/vda of=/dev/null bs=1M count=4 iflag=direct
         mark read
         await finish
         blkdiscard /dev/vda",
    );
    let mut guest = Guest::start(&spec.vhost_user_disk("disk0", &peer.socket, 2))?;
    guest.wait_ready()?;
    guest.send("ignored: the job waits for another word")?;
    guest.send("begin")?;
    assert_eq!(guest.wait_mark("written", LIMIT)?, (64u64 << 20).to_string());
    assert!(fs::read(&peer.image)?.starts_with(b"guest was here"), "the guest's write reached the host");

    peer.restart()?;
    guest.send("restarted")?;
    guest.wait_mark("read", LIMIT)?;
    let status = guest.execute("query-status", json!({}))?;
    assert_eq!(status["status"], "running");
    guest.send("finish")?;
    let console = guest.finish(LIMIT)?;
    assert!(console.contains("err= 0"), "fio's verdict is on the console:\n{console}");
    Ok(())
}

#[test]
fn a_failing_job_is_an_error_with_its_console() -> Result<()> {
    let mut guest = Guest::start(&GuestSpec::new("echo 'something broke'; exit 7"))?;
    guest.wait_ready()?;
    let error = guest.wait_mark("never", LIMIT).unwrap_err().to_string();
    assert!(error.contains("the job ended with 7") && error.contains("something broke"), "{error}");
    Ok(())
}

#[test]
fn bad_arguments_are_an_error_with_the_words_of_qemu() {
    let spec = GuestSpec::new("true").args(["-device", "no-such-device"]);
    let error = format!("{:#}", Guest::start(&spec).unwrap_err());
    assert!(error.contains("no-such-device"), "{error}");
}

#[test]
fn the_tools_of_jobs_work_in_a_guest_on_huge_pages_as_another_user() -> Result<()> {
    let peer = Peer::start(512)?;
    for path in [peer.socket.parent().context("folder")?, &peer.socket] {
        fs::set_permissions(path, Permissions::from_mode(0o777))?;
    }
    let _pages = HugePages::reserve(512)?;
    let spec = GuestSpec::new(
        "mkfs.ext4 -q /dev/vda; mount -t ext4 /dev/vda /mnt; echo text >/mnt/file; umount /mnt; e2fsck -fn /dev/vda
         mkfs.xfs -q -f /dev/vda; modprobe xfs; mount -t xfs /dev/vda /mnt; umount /mnt; xfs_repair -n /dev/vda
         modprobe nbd; test -b /dev/nbd0
         nbd-client -V 2>&1 | grep nbd-client
         modprobe dm_mod; dmsetup create linear --table '0 2048 linear /dev/vda 0'
         dd if=/dev/dm-0 of=/dev/null bs=1M count=1
         cat /hello; ping -c 1 -W 5 10.0.2.2",
    );
    let spec = spec.vhost_user_disk("disk0", &peer.socket, 2).memory(512, Memory::HugePages2M);
    let spec = spec.network().file("hello", "hello from the test\n").run_as(NOBODY, NOBODY);
    let guest = Guest::start(&spec)?;
    let status = fs::read_to_string(format!("/proc/{}/status", guest.id()))?;
    assert!(status.contains(&format!("Uid:\t{NOBODY}\t{NOBODY}")), "{status}");
    let console = guest.finish(LIMIT)?;
    assert!(console.contains("hello from the test"), "{console}");
    Ok(())
}

#[test]
fn a_guest_goes_on_where_it_was_after_a_migration() -> Result<()> {
    let spec = GuestSpec::new(
        "count=0
         mark before
         while ! [ -e /tmp/moved ]; do count=$((count + 1)); mark tick $count; read -t 1 -r REPLY <&8 && touch /tmp/moved; done
         mark after $count $REPLY",
    );
    let mut source = Guest::start(&spec)?;
    let mut target = Guest::start(&spec.incoming())?;
    source.wait_mark("before", LIMIT)?;
    source.migrate(&mut target, LIMIT)?;
    source.kill()?;
    target.wait_mark("tick", LIMIT)?;
    target.send("moved")?;
    let text = target.wait_mark("after", LIMIT)?;
    let (count, word) = text.split_once(' ').context("two words")?;
    assert!(count.parse::<u32>()? > 1 && word == "moved", "{text}");
    target.finish(LIMIT)?;
    Ok(())
}
