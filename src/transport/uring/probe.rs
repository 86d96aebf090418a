//! What this kernel's io_uring offers the transport: asked where it can be asked, tried where it cannot.

use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

use io_uring::types::Fd;
use io_uring::{Probe, cqueue, opcode};

use super::ring::Ring;
use super::send::REPORT_USAGE;
use crate::transport::error::TransportError;

/// Loopback answers at once; a kernel that does not is not waited for.
const ANSWER: Duration = Duration::from_secs(1);

/// What is sent to find out; static, so that it outlives whatever the kernel still does with it.
static MESSAGE: [u8; 4096] = [0; 4096];

/// What io_uring can do here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct UringSupport {
    /// `SEND_ZC`: one piece of memory, zero-copy. Linux 6.0.
    pub send_zc: bool,
    /// `SENDMSG_ZC`: scattered memory, zero-copy. Linux 6.1.
    pub sendmsg_zc: bool,
    /// Whether a zero-copy send says afterwards if the kernel had to copy after all. Linux 6.2.
    pub reports_usage: bool,
}

impl UringSupport {
    /// Sets up a ring as a channel does, asks it for its operations, and sends a page over loopback.
    ///
    /// # Errors
    ///
    /// [`TransportError::Ring`]: a ring cannot be set up. `ENOSYS` is a kernel without io_uring, `EINVAL` one before
    /// Linux 6.1, `EPERM` means `kernel.io_uring_disabled` or a seccomp filter.
    pub fn probe() -> Result<Self, TransportError> {
        let mut ring = Ring::new(4)?;
        let mut operations = Probe::new();
        ring.io
            .submitter()
            .register_probe(&mut operations)
            .map_err(|source| TransportError::Ring { what: "IORING_REGISTER_PROBE", source })?;
        let send_zc = operations.is_supported(opcode::SendZc::CODE);
        let mut tried = || tcp_pair().and_then(|pair| usage_is_reported(&mut ring, &pair));
        Ok(Self {
            send_zc,
            sendmsg_zc: operations.is_supported(opcode::SendMsgZc::CODE),
            // Without a loopback interface there is nothing to try it on, and nobody to send to either.
            reports_usage: send_zc && tried().unwrap_or(false),
        })
    }
}

fn tcp_pair() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let sender = TcpStream::connect(listener.local_addr()?)?;
    Ok((sender, listener.accept()?.0))
}

/// A kernel that does not know the flag refuses the send with `EINVAL`.
fn usage_is_reported(ring: &mut Ring, (sender, _receiver): &(TcpStream, TcpStream)) -> io::Result<bool> {
    let length = MESSAGE.len().try_into().map_err(io::Error::other)?;
    let send = opcode::SendZc::new(Fd(sender.as_raw_fd()), MESSAGE.as_ptr(), length).zc_flags(REPORT_USAGE);
    // SAFETY: the memory is static and never written.
    unsafe { ring.push(&[send.build()]) }?;
    ring.enter(ANSWER)?;
    Ok(ring.completion().is_some_and(|first| !cqueue::notif(first.flags()) && first.result() > 0))
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
