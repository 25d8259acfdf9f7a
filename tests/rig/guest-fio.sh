#!/bin/sh
# guest-fio.sh FOLDER OUTPUT: builds a small static fio from Debian's source package.
# Debian's own binary needs 80 MB of libraries, too much for an initial file system.
# Runs with APT_CONFIG set to the rig's own view of the package archive.
set -eu
folder=$1 output=$2
mkdir -p "$folder"
cd "$folder"
apt-get source --download-only -q fio/bookworm
rm -rf fio-source
mkdir fio-source
tar xf fio_*.orig.tar.gz -C fio-source --strip-components=1
cd fio-source
./configure --build-static --disable-native --disable-numa --disable-rdma --disable-rados --disable-rbd \
    --disable-http --disable-gfapi --disable-libnfs --disable-pmem --disable-xnvme --disable-libzbc \
    --disable-tcmalloc --disable-dfs
make -j"$(nproc)"
strip -o "$output.new" fio
mv "$output.new" "$output"
