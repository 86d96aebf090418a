//! Will it finish, who must slow down, when to switch over. Numbers only: no KVM, no sockets, no clock.
