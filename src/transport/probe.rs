//! What this kernel's io_uring offers the transport: asked where it can be asked, tried where it cannot.
#![expect(
    unsafe_code,
    reason = "an entry of the submission queue is a promise about memory, given by one push"
)]

use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, cqueue, opcode};

/// `IORING_SEND_ZC_REPORT_USAGE` of `linux/io_uring.h`: the notification says whether the pages were sent or
/// copied.
const REPORT_USAGE: u16 = 1 << 3;

/// What is sent to find out; static, so that it outlives whatever the kernel still does with it.
static MESSAGE: [u8; 4096] = [0; 4096];

/// What io_uring can do here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UringSupport {
    /// `SEND_ZC`: one piece of memory, zero-copy. Linux 6.0.
    pub send_zc: bool,
    /// `SENDMSG_ZC`: scattered memory, zero-copy. Linux 6.1.
    pub sendmsg_zc: bool,
    /// Whether a zero-copy send says afterwards if the kernel had to copy after all. Linux 6.2.
    pub reports_usage: bool,
}

impl UringSupport {
    /// Sets up a ring, asks it for its operations, and sends a page over loopback.
    ///
    /// # Errors
    ///
    /// A ring cannot be set up: no io_uring in this kernel (`ENOSYS`), forbidden by `kernel.io_uring_disabled` or
    /// a seccomp filter (`EPERM`), too little locked memory allowed (`ENOMEM`, before Linux 5.12).
    pub fn probe() -> io::Result<Self> {
        let mut ring = IoUring::new(4)?;
        let mut operations = Probe::new();
        ring.submitter().register_probe(&mut operations)?;
        let send_zc = operations.is_supported(opcode::SendZc::CODE);
        Ok(Self {
            send_zc,
            sendmsg_zc: operations.is_supported(opcode::SendMsgZc::CODE),
            // Without a loopback interface there is nothing to try it on, and nobody to send to either.
            reports_usage: send_zc
                && tcp_pair().and_then(|pair| usage_is_reported(&mut ring, &pair)).unwrap_or(false),
        })
    }
}

fn tcp_pair() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let sender = TcpStream::connect(listener.local_addr()?)?;
    Ok((sender, listener.accept()?.0))
}

/// A kernel that does not know the flag refuses the send with `EINVAL`.
fn usage_is_reported(ring: &mut IoUring, (sender, _receiver): &(TcpStream, TcpStream)) -> io::Result<bool> {
    let length = MESSAGE.len().try_into().map_err(io::Error::other)?;
    let send = opcode::SendZc::new(Fd(sender.as_raw_fd()), MESSAGE.as_ptr(), length).zc_flags(REPORT_USAGE);
    // SAFETY:
    // * The memory is static and never written.
    // * The socket outlives the ring's work on it: the kernel holds its own reference.
    unsafe { ring.submission().push(&send.build()) }.map_err(io::Error::other)?;
    // Loopback answers at once; a kernel that does not is not waited for.
    let second = Timespec::new().sec(1);
    ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&second))?;
    Ok(ring.completion().any(|first| !cqueue::notif(first.flags()) && first.result() > 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_reports_usage_also_sends_zero_copy() {
        let support = match UringSupport::probe() {
            Ok(support) => support,
            Err(error) => return ringferry_testvm::skip(&format!("no io_uring: {error}")),
        };
        assert!(!support.reports_usage || support.send_zc);
        assert!(!support.sendmsg_zc || support.send_zc);
    }
}
