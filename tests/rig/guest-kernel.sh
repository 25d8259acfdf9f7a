#!/bin/sh
# guest-kernel.sh FOLDER: downloads and unpacks (does not install) Debian's cloud kernel into FOLDER/tree.
# Runs with APT_CONFIG set to the rig's own view of the package archive.
set -eu
folder=$1
export PATH="$PATH:/usr/sbin:/sbin"
rm -rf "$folder/tree" "$folder/packages"
mkdir -p "$folder/packages"
cd "$folder/packages"
image=$(apt-cache show linux-image-cloud-amd64/bookworm-backports | sed -n 's/^Depends: \(linux-image-[^ ]*\).*/\1/p' | head -n 1)
[ -n "$image" ] || { echo "bookworm-backports has no cloud kernel" >&2; exit 1; }
apt-get -q download "$image/bookworm-backports"
dpkg -x "$image"_*.deb "$folder/tree.new"
depmod -b "$folder/tree.new" "$(ls "$folder/tree.new/lib/modules")"
mv "$folder/tree.new" "$folder/tree"
rm -rf "$folder/packages"
