//! How a VMM and its offload process find each other where no descriptor is inherited: the VMM listens on a path.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect as connect_to, listen,
    socket_with,
};

/// Offload processes that may wait to be served. A VM has one migration at a time.
const BACKLOG: i32 = 4;

/// A VMM's listening socket. Its path goes with it.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    path: PathBuf,
}

impl Listener {
    /// Listens on `path`, for this user (and root) only: whoever connects is given all of the guest's memory.
    ///
    /// # Errors
    ///
    /// The kernel's; `AddrInUse` if somebody listens there.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let is_left_behind =
            || fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) && is_dead(path);
        let address = SocketAddrUnix::new(path)?;
        let socket = new_socket()?;
        match bind(&socket, &address) {
            Err(Errno::ADDRINUSE) if is_left_behind() => {
                fs::remove_file(path)?;
                bind(&socket, &address)?;
            }
            bound => bound?,
        }
        let listener = Self { socket, path: path.to_owned() };
        // Before it listens, nobody can connect.
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        listen(&listener.socket, BACKLOG)?;
        Ok(listener)
    }

    /// The next offload process, if one comes within `limit`.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn accept(&self, limit: Duration) -> io::Result<Option<OwnedFd>> {
        let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&limit)) {
            Ok(0) | Err(Errno::INTR) => Ok(None),
            Ok(_) => match accept_with(&self.socket, SocketFlags::CLOEXEC) {
                Ok(connection) => Ok(Some(connection)),
                // It has gone again.
                Err(Errno::CONNABORTED | Errno::AGAIN | Errno::INTR) => Ok(None),
                Err(errno) => Err(errno.into()),
            },
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // It may have been removed by somebody else.
        let _ = fs::remove_file(&self.path);
    }
}

/// Connects an offload process to the VMM that listens on `path`.
///
/// # Errors
///
/// The kernel's.
pub fn connect(path: &Path) -> io::Result<OwnedFd> {
    let socket = new_socket()?;
    connect_to(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

fn new_socket() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Whether nobody listens on a socket's path any more.
fn is_dead(path: &Path) -> bool {
    connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_was_left_behind_is_taken_and_one_that_is_in_use_is_not() {
        let path = std::env::temp_dir().join(format!("ringferry-listener-{}", std::process::id()));
        let first = Listener::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(Listener::bind(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert!(
            first.accept(Duration::ZERO).unwrap().is_some(),
            "the second looked whether somebody listens"
        );
        assert!(first.accept(Duration::ZERO).unwrap().is_none());
        // As a killed process leaves it.
        let socket = std::mem::ManuallyDrop::new(first);
        rustix::net::shutdown(&socket.socket, rustix::net::Shutdown::Both).unwrap();
        let second = Listener::bind(&path).unwrap();
        let _connection = connect(&path).unwrap();
        assert!(second.accept(Duration::from_secs(5)).unwrap().is_some());
        drop(second);
        assert!(!path.exists());
    }
}
