//! The error of one I/O request, as a guest or an NBD client can be told it.

use std::fmt;

/// A non-zero Linux error number.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(i32);

impl Errno {
    pub const EIO: Errno = Errno(libc::EIO);
    pub const EINVAL: Errno = Errno(libc::EINVAL);
    pub const ENOSPC: Errno = Errno(libc::ENOSPC);
    pub const EROFS: Errno = Errno(libc::EROFS);
    pub const EPERM: Errno = Errno(libc::EPERM);
    pub const ENOMEM: Errno = Errno(libc::ENOMEM);
    pub const EOPNOTSUPP: Errno = Errno(libc::EOPNOTSUPP);
    pub const ESHUTDOWN: Errno = Errno(libc::ESHUTDOWN);
    pub const ETIMEDOUT: Errno = Errno(libc::ETIMEDOUT);

    /// From a positive error number; zero and negative numbers, which no kernel returns here, become EIO.
    pub fn from_raw(number: i32) -> Errno {
        if number > 0 { Errno(number) } else { Errno::EIO }
    }

    /// From the `errno` inside an [`std::io::Error`]; EIO where it carries none.
    pub fn from_io(error: &std::io::Error) -> Errno {
        error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
    }

    /// True if there is no space: nothing is broken, and what was refused may succeed when some is freed.
    pub fn is_no_space(self) -> bool {
        [libc::ENOSPC, libc::EDQUOT].contains(&self.0)
    }

    /// Of a write that was to be durable: true if writes acknowledged before may be lost with it. Refusals of this one write alone
    /// are told apart, such as that of a client's memory that has gone; whatever else there is counts as loss.
    pub fn may_lose_earlier_writes(self) -> bool {
        const REFUSALS: [i32; 10] = [
            libc::ENOSPC,
            libc::EDQUOT,
            libc::EFBIG,
            libc::EINVAL,
            libc::EOPNOTSUPP,
            libc::EFAULT,
            libc::ENOMEM,
            libc::EPERM,
            libc::EBADF,
            libc::ECANCELED,
        ];
        !REFUSALS.contains(&self.0)
    }

    pub fn raw(self) -> i32 {
        self.0
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        std::io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({}: {self})", self.0)
    }
}

impl std::error::Error for Errno {}
