//! A minimal real VMM and its guest.
