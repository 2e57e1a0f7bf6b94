//! Page protocol over QUIC.
