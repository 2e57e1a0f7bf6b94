//! The network of a tree while it is between two hosts: what would come to its sockets is kept away from them, and kept.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::error::{Context, Result};
use crate::kernel::capture::{Capture, Interest, deliver, is_datagram, not_received};
use crate::kernel::datagram::Datagram;
use crate::kernel::nft::NetworkLock;
use crate::kernel::sock_diag;
use crate::resource::Endpoints;

/// How long a program may take to accept the connections that it has been told of, before it is frozen anyway. One that
/// is not accepted by then cannot be carried.
const ACCEPTING: Duration = Duration::from_millis(5);
/// TCP_LISTEN, as sock_diag says it.
const LISTEN: u8 = 10;

/// The lock, and the packets that came in meanwhile. When it is dropped before the tree has moved, they are delivered here.
pub struct Network {
    lock: NetworkLock,
    capture: Option<Capture>,
    /// Datagrams that came by when the lock was put; `received` tells which of them their sockets have.
    doubtful: Vec<Vec<u8>>,
    /// Packets that they do not have.
    kept: Vec<Vec<u8>>,
    moved: bool,
}

impl Network {
    /// Before the freeze: new connections are held off, and those that were begun are accepted, so that none is lost.
    /// Where that is not possible, they are lost as they would be when a server is restarted, and a warning says so.
    ///
    /// # Errors
    /// When there is no netlink socket for nftables.
    pub fn before_freeze(listeners: &[SocketAddr]) -> Result<Network> {
        let mut network = Network {
            lock: NetworkLock::new_in_current_netns().context("lock the network")?,
            capture: None,
            doubtful: Vec::new(),
            kept: Vec::new(),
            moved: false,
        };
        if listeners.is_empty() {
            return Ok(network);
        }
        network.keep(Interest::new(&[], listeners));
        match network.lock.lock_listeners(listeners) {
            Ok(()) => wait_until_accepted(listeners),
            Err(error) => tracing::warn!(
                error = crate::error::Error::new("hold new connections off")
                    .because(error)
                    .chain(),
                "connections that begin in the freeze are lost"
            ),
        }
        Ok(network)
    }

    /// In the freeze: nothing comes to any socket of the tree any more.
    ///
    /// # Errors
    /// When the connections cannot be locked: their other ends would be answered with resets.
    pub fn lock(&mut self, endpoints: &Endpoints) -> Result<()> {
        let Endpoints {
            connections,
            listeners,
            datagrams,
        } = endpoints;
        if connections.is_empty() && listeners.is_empty() && datagrams.is_empty() {
            return Ok(());
        }
        // What comes between the two is both kept and received.
        self.keep(Interest::new(connections, listeners).with_datagrams(datagrams));
        if !connections.is_empty() {
            self.lock.lock(connections).context("lock the network")?;
        }
        if !datagrams.is_empty()
            && let Err(error) = self.lock.lock_datagrams(datagrams)
        {
            // Received twice is what may happen to any datagram.
            tracing::warn!(%error, "datagrams that come in the freeze may be received twice");
        }
        (self.doubtful, self.kept) = self.take_packets().into_iter().partition(|packet| is_datagram(packet));
        Ok(())
    }

    /// Told what the sockets of datagrams have in their queues.
    pub fn received(&mut self, queues: &[Datagram]) {
        self.kept
            .extend(not_received(std::mem::take(&mut self.doubtful), queues));
    }

    fn keep(&mut self, interest: Interest) {
        let kept = match &mut self.capture {
            Some(capture) => capture.set_interest(interest),
            None => Capture::start(interest).map(|capture| self.capture = Some(capture)),
        };
        if let Err(error) = kept {
            tracing::warn!(%error, "packets that come in the freeze are not kept: their senders send them again");
        }
    }

    /// Packets that came since it was last asked.
    pub fn take_packets(&mut self) -> Vec<Vec<u8>> {
        let mut packets = std::mem::take(&mut self.kept);
        packets.extend(self.capture.as_ref().map(Capture::take).unwrap_or_default());
        packets
    }

    /// The tree has moved: its packets are not for this host any more. The lock stays until this is dropped.
    pub fn moved(&mut self) {
        self.moved = true;
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // Not left to the lock's own end: closing its socket with a table in it waits for a grace period of the kernel.
        if let Err(error) = self.lock.unlock() {
            tracing::warn!(%error, "the network lock goes with its socket");
        }
        let Some(capture) = self.capture.take() else {
            return;
        };
        let mut packets = std::mem::take(&mut self.kept);
        packets.extend(capture.take());
        if !self.moved
            && let Err(error) = deliver(&packets, capture.interest())
        {
            tracing::debug!(%error, "packets that were kept are lost");
        }
        // Closing the capture waits for such a period as well, and the tree is still frozen.
        let _ = std::thread::Builder::new().spawn(move || drop(capture));
    }
}

/// Waits a moment until the queues of listening sockets are empty.
fn wait_until_accepted(listeners: &[SocketAddr]) {
    let deadline = Instant::now() + ACCEPTING;
    loop {
        let sockets = sock_diag::inet_sockets(libc::IPPROTO_TCP as u8).unwrap_or_default();
        let ours = |socket: &&sock_diag::InetSocket| socket.state == LISTEN && listeners.contains(&socket.local);
        let waiting: u32 = sockets.iter().filter(ours).map(|socket| socket.receive_queue).sum();
        if waiting == 0 {
            return;
        }
        if Instant::now() > deadline {
            tracing::warn!("{waiting} new connections were not accepted in time, and are lost");
            return;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}
