#!/bin/sh
# guest-initramfs.sh KERNEL_TREE FIO OUTPUT: builds the guest's initial file system (a cpio archive):
# busybox, a static fio, the tools of guest jobs with their libraries, and the kernel modules they use.
set -eu
tree=$1 fio=$2 output=$3
here=$(dirname "$(readlink -f "$0")")
export PATH="$PATH:/usr/sbin:/sbin"
version=$(ls "$tree/lib/modules")
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
cd "$root"
mkdir -p bin sbin usr/bin usr/sbin etc proc sys dev tmp mnt run lib64 "lib/modules/$version"

cp "$(command -v busybox)" bin/busybox
for applet in $(busybox --list); do
    [ "$applet" = busybox ] || ln -s /bin/busybox "bin/$applet"
done
ln -sf /bin/busybox sbin/modprobe

cp "$fio" usr/bin/fio
for tool in nbd-client mkfs.ext4 e2fsck mkfs.xfs xfs_repair blkdiscard blockdev dmsetup; do
    path=$(command -v "$tool")
    rm -f "bin/$tool"
    cp -L "$path" "usr/bin/$tool"
    ldd "$path" | grep -o '/[^ ]*' | while read -r library; do
        mkdir -p ".$(dirname "$library")"
        cp -L "$library" ".$library"
    done
done
cp /etc/mke2fs.conf etc/
ln -s /proc/mounts etc/mtab
echo 'root:x:0:0:root:/tmp:/bin/sh' >etc/passwd
echo 'root:x:0:' >etc/group

for module in virtio_pci virtio_blk virtio_net nbd ext4 xfs crc32c_generic dm_mod dm_log_writes dm_flakey dm_crypt \
    dm_integrity loop brd null_blk fuse tls aes_generic xts sha256_generic virtio_balloon; do
    # A module may be built in, or renamed by a newer kernel: what a job lacks, its own modprobe reports.
    modprobe -d "$tree" -S "$version" --show-depends "$module" 2>/dev/null || true
done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | sort -u | while read -r file; do
    target="lib/modules/$version/${file#"$tree/lib/modules/$version/"}"
    mkdir -p "$(dirname "$target")"
    case $file in
    *.xz) xz -dc "$file" >"${target%.xz}" ;;
    *) cp "$file" "$target" ;;
    esac
done
cp "$tree/lib/modules/$version"/modules.builtin* "$tree/lib/modules/$version/modules.order" "lib/modules/$version/"
depmod -b "$root" "$version"

cp "$here/guest-init" init
cp "$here/guest-job.sh" rig.sh
chmod 755 init
find . | cpio -o -H newc --quiet -R 0:0 >"$output.new"
mv "$output.new" "$output"
