#!/bin/bash
# Boots systemd as process 1 of namespaces of its own, without a network, over a view of this machine's files that keeps changes in memory.
#
#   systemd.sh STATE     STATE/files is laid over /, STATE/data becomes /var/lib/novastor, STATE/pid will hold the process's number
#
# It ends when that process does.
set -euo pipefail
state=$1
root=$state/root
step=${2:-mounts}

if [ "$step" = mounts ]; then
    exec unshare --mount bash "$0" "$state" group
fi

if [ "$step" = group ]; then
    mkdir "$state/groups" "$state/memory" "$root"
    mount -t cgroup2 cgroup2 "$state/groups"
    group=$state/groups/novastor-test-$$
    mkdir "$group"
    trap 'find "$group" -depth -type d -exec rmdir {} \;' EXIT
    mount -t tmpfs tmpfs "$state/memory"
    mkdir "$state/memory/changed" "$state/memory/work"
    mount -t overlay overlay -o "lowerdir=/,upperdir=$state/memory/changed,workdir=$state/memory/work" "$root"
    cp -a "$state/files/." "$root"
    mkdir -p "$root/var/lib/novastor"
    mount --bind "$state/data" "$root/var/lib/novastor"
    (
        echo $BASHPID >"$group/cgroup.procs"
        exec unshare --cgroup --fork --ipc --mount --net --pid --uts bash "$0" "$state" boot
    ) || true
    exit
fi

# A shell's own reading, in the table of processes of the machine.
read -r pid _ </proc/self/stat
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/dev"
for device in full null random tty urandom zero; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts devpts "$root/dev/pts"
mount -t tmpfs tmpfs "$root/dev/shm"
echo "$pid" >"$state/pid.new"
mv "$state/pid.new" "$state/pid"
cd "$root"
mkdir -p run/before
pivot_root . run/before
umount --lazy /run/before
# As a container's manager does: systemd hands credentials to services through mounts that propagate.
mount --make-rshared /
exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system --unit=sysinit.target --log-target=console
