//! A guest's job that verifies one part of its disk again and again, and fills another with what it is told to.
//!
//! ```text
//!   0..4 MiB    filled     send(N) ─▶ content number N, flushed ─▶ mark filled MD5           send("sum") ─▶ mark sum MD5
//!   8..16 MiB   load       written and verified, over and over: mark verified               send("rest") ─▶ mark resting, all of it flushed
//!                                                                                            send("go") ─▶ verified once more: mark kept
//! ```
//!
//! `send("stop")` ends it. Whatever does not verify ends it with an error.

use crate::rig::fio::Fio;

/// Bytes, from the disk's beginning.
pub const FILLED: usize = 4 << 20;
/// The least size of the disk.
pub const SIZE: &str = "16M";

/// The script of the job, for the disk `vda`.
pub fn script() -> String {
    let filled_mib = FILLED as u64 >> 20;
    let part = |offset, size| Fio::disk("/dev/vda").verify(offset, size).with(["--minimal", "--end_fsync=1"]).line();
    let (fill, load) = (part(0, filled_mib), part(8, 8));
    format!(
        "load() {{ {load} --randseed=$passes $* >/tmp/load.log 2>&1 || {{ cat /tmp/load.log; dmesg | tail; kill $$; }}; }}
         sum() {{ dd if=/dev/vda bs=1M count={filled_mib} iflag=direct 2>/dev/null | md5sum | cut -d' ' -f1; }}
         (passes=1
          while ! [ -e /tmp/stop ]; do
              load
              mark verified
              if [ -e /tmp/rest ]; then
                  mark resting
                  while [ -e /tmp/rest ]; do sleep 0.1; done
                  load --verify_only
                  mark kept
              fi
              passes=$((passes + 1))
          done) &
         while await && [ $REPLY != stop ]; do
             case $REPLY in
             rest) touch /tmp/rest;;
             go) rm /tmp/rest;;
             sum) mark sum $(sum);;
             *)
                 {fill} --randseed=$REPLY >/tmp/fill.log 2>&1 || {{ cat /tmp/fill.log; exit 1; }}
                 mark filled $(sum);;
             esac
         done
         touch /tmp/stop
         wait
         ! dmesg | grep -iE 'i/o error|blk_update_request|timeout|reset'"
    )
}
