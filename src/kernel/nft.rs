//! The network lock: while connections are taken apart, or put together, no packet of theirs may reach the kernel's TCP,
//! or it would answer with a reset.
//!
//! The lock is an nftables table that belongs to our netlink socket (`NFT_TABLE_F_OWNER`): nobody else can change it, and the
//! kernel removes it when the socket is closed, however our process ends. Two sets hold the connections of IPv4 and of
//! IPv6, so the cost for a packet does not grow with their number, and other connections are not touched.
//!
//! ```text
//! table inet whimbrel-PID {
//!   set v4 / v6    source . destination . source port . destination port . protocol
//!   set listen4 / listen6    destination . destination port
//!   set listen     destination port
//!   set datagram, datagram4 / datagram6    as those of listeners
//!   chain in       prerouting, priority -399: [mark == exempt: accept], in v4: drop, in v6: drop,
//!                  first packet of a TCP connection: in listen, listen4, listen6: drop,
//!                  packet of UDP: in datagram, datagram4, datagram6: drop
//!   chain out      output,     priority -399: the same without listeners
//! }
//! ```
//!
//! Of listening sockets only the first packet of a handshake is dropped: those that have begun come to their end.
//!
//! The priority is the first after reassembly of fragments (-400), so that ports can be seen, and before raw (-300) and
//! connection tracking (-200).

use std::io;
use std::net::{IpAddr, SocketAddr};

use super::netlink::{
    Messages, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NLMSG_ERROR, Socket, Writer, truncated,
};

const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = 0;
const GET_TABLE: u16 = 1;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;
const NEW_SET: u16 = 9;
const NEW_ELEMENT: u16 = 12;

const FAMILY_INET: u8 = 1;
const TABLE_OWNER: u32 = 2;
const PRIORITY: i32 = -399;
const HOOK_PREROUTING: u32 = 0;
const HOOK_OUTPUT: u32 = 3;
const DROP: u32 = 0;
const ACCEPT: u32 = 1;

const REGISTER_VERDICT: u32 = 0;
/// The first of sixteen registers of four bytes.
const REGISTER: u32 = 8;
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
const META_MARK: u32 = 3;
const META_FAMILY: u32 = 15;
const META_PROTOCOL: u32 = 16;
/// Byte 13 of a TCP header: FIN, SYN, RST and ACK.
const TCP_FLAGS: u8 = 0x17;
const TCP_SYN: u8 = 0x02;

/// Elements of one message; an attribute holds less than 64 KiB.
const ELEMENTS: usize = 500;

/// A transport protocol that can be locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    fn number(self) -> u8 {
        match self {
            Self::Tcp => libc::IPPROTO_TCP as u8,
            Self::Udp => libc::IPPROTO_UDP as u8,
        }
    }
}

/// A connection, seen from this host. Addresses of IPv4 mapped into IPv6 count as IPv4, which is what is on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Connection {
    /// Its protocol.
    pub protocol: Protocol,
    /// This end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
}

/// Why the network could not be locked or unlocked.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// No netlink socket for nftables.
    #[error("cannot open a netlink socket for nftables")]
    Socket(#[source] io::Error),
    /// The kernel refused a change; nothing of it was done.
    #[error("cannot {what} in nftables table {table}")]
    Change {
        /// What was to be done.
        what: &'static str,
        /// The table.
        table: String,
        /// The kernel's answer: EOPNOTSUPP where nf_tables is missing or too old for tables with an owner, EPERM
        /// without CAP_NET_ADMIN over the network namespace.
        #[source]
        source: io::Error,
    },
    /// The two ends are of different address families.
    #[error("connection {} – {} mixes address families", .0.local, .0.remote)]
    MixedFamilies(Connection),
}

/// Connections whose packets are dropped. Dropping the lock lets them pass again, and so does the end of the process.
///
/// The socket is close-on-exec, but a child that was forked and executed nothing holds a copy of it, and with it the lock.
#[derive(Debug)]
pub struct NetworkLock {
    socket: Socket,
    table: String,
    made: bool,
    exempt_mark: Option<u32>,
    /// The table stays when this process ends.
    lasting: bool,
}

impl NetworkLock {
    /// A lock for the network namespace that the calling thread is in. It holds nothing yet.
    ///
    /// # Errors
    /// When there is no netlink socket for nftables.
    pub fn new_in_current_netns() -> Result<Self, NftError> {
        // The thread may be in a pid namespace of its own, or another lock of ours may be there: see `lock`.
        let table = format!("whimbrel-{}", std::process::id());
        let socket = Socket::new(libc::NETLINK_NETFILTER).map_err(NftError::Socket)?;
        Ok(Self {
            socket,
            table,
            made: false,
            exempt_mark: None,
            lasting: false,
        })
    }

    /// As [`NetworkLock::new_in_current_netns`], with a table `name` that neither dropping the lock nor the end of the
    /// process removes: only [`remove_table`] does. For dumps whose connections are restored by another process.
    ///
    /// # Errors
    /// As [`NetworkLock::new_in_current_netns`].
    pub fn lasting_in_current_netns(name: String) -> Result<Self, NftError> {
        Ok(Self {
            table: name,
            lasting: true,
            ..Self::new_in_current_netns()?
        })
    }

    /// Packets that carry this mark (SO_MARK) pass. To be set before the first [`NetworkLock::lock`].
    #[must_use]
    pub fn exempt_mark(mut self, mark: Option<u32>) -> Self {
        self.exempt_mark = mark;
        self
    }

    /// Name of the table in family inet.
    pub fn table(&self) -> &str {
        &self.table
    }

    /// Drops packets of these connections, in both directions, from now on; those locked before stay locked. All of it
    /// happens in one step or not at all.
    ///
    /// # Errors
    /// When a connection mixes address families, or the kernel refuses.
    pub fn lock(&mut self, connections: &[Connection]) -> Result<(), NftError> {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for connection in connections {
            let number = connection.protocol.number();
            let (local, remote) = (connection.local, connection.remote);
            for (from, to) in [(local, remote), (remote, local)] {
                match (from.ip().to_canonical(), to.ip().to_canonical()) {
                    (IpAddr::V4(source), IpAddr::V4(destination)) => {
                        v4.push(key(
                            &source.octets(),
                            &destination.octets(),
                            from.port(),
                            to.port(),
                            number,
                        ));
                    }
                    (IpAddr::V6(source), IpAddr::V6(destination)) => {
                        v6.push(key(
                            &source.octets(),
                            &destination.octets(),
                            from.port(),
                            to.port(),
                            number,
                        ));
                    }
                    _ => return Err(NftError::MixedFamilies(*connection)),
                }
            }
        }
        self.add(&[("v4", v4), ("v6", v6)])
    }

    /// Drops packets that begin a TCP connection to these listening sockets, in the same way. An unspecified address
    /// stands for the port with all addresses of both families.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn lock_listeners(&mut self, listeners: &[SocketAddr]) -> Result<(), NftError> {
        self.lock_addresses(listeners, ["listen", "listen4", "listen6"])
    }

    /// Drops datagrams of UDP to these addresses, in the same way, whoever sends them.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn lock_datagrams(&mut self, sockets: &[SocketAddr]) -> Result<(), NftError> {
        self.lock_addresses(sockets, ["datagram", "datagram4", "datagram6"])
    }

    fn lock_addresses(&mut self, addresses: &[SocketAddr], sets: [&str; 3]) -> Result<(), NftError> {
        let (mut any, mut v4, mut v6) = (Vec::new(), Vec::new(), Vec::new());
        for address in addresses {
            let [high, low] = address.port().to_be_bytes();
            let port = [high, low, 0, 0];
            match address.ip().to_canonical() {
                ip if ip.is_unspecified() => any.push(port.to_vec()),
                IpAddr::V4(ip) => v4.push([&ip.octets()[..], &port].concat()),
                IpAddr::V6(ip) => v6.push([&ip.octets()[..], &port].concat()),
            }
        }
        let [set_any, set_v4, set_v6] = sets;
        self.add(&[(set_any, any), (set_v4, v4), (set_v6, v6)])
    }

    /// Adds elements to the sets of the table, which is made if it is not there.
    fn add(&mut self, elements: &[(&str, Vec<Vec<u8>>)]) -> Result<(), NftError> {
        for attempt in 1.. {
            let mut batch = Batch::new();
            if !self.made {
                self.write_table(&mut batch);
            }
            for (set, keys) in elements {
                keys.chunks(ELEMENTS)
                    .for_each(|keys| write_elements(&mut batch, &self.table, set, keys));
            }
            match batch.run(&self.socket) {
                Ok(()) => break,
                // A name is taken when another lock of this process, or of one with our pid elsewhere, is in place.
                Err(error) if !self.made && !self.lasting && taken(&error) && attempt < 100 => {
                    self.table = format!("whimbrel-{}-{attempt}", std::process::id());
                }
                Err(error) => return Err(self.error("lock connections", error)),
            }
        }
        self.made = true;
        Ok(())
    }

    /// Lets all packets pass again.
    ///
    /// # Errors
    /// When the kernel refuses. Dropping the lock works all the same.
    pub fn unlock(&mut self) -> Result<(), NftError> {
        if !self.made {
            return Ok(());
        }
        let mut batch = Batch::new();
        batch.add(DELETE_TABLE, 0, |message| message.string(1, &self.table));
        batch
            .run(&self.socket)
            .map_err(|error| self.error("unlock connections", error))?;
        self.made = false;
        Ok(())
    }

    fn error(&self, what: &'static str, source: io::Error) -> NftError {
        NftError::Change {
            what,
            table: self.table.clone(),
            source,
        }
    }

    fn write_table(&self, batch: &mut Batch) {
        let table = &self.table;
        batch.add(NEW_TABLE, NLM_F_CREATE | NLM_F_EXCL, |message| {
            message.string(1, table);
            message.be32(2, if self.lasting { 0 } else { TABLE_OWNER });
        });
        for (id, family) in FAMILIES.iter().enumerate() {
            batch.add(NEW_SET, NLM_F_CREATE | NLM_F_EXCL, |message| {
                message.string(1, table);
                message.string(2, family.set);
                message.be32(3, 0);
                message.be32(4, family.key_type());
                message.be32(5, family.key_len());
                message.be32(10, id as u32 + 1);
            });
        }
        for (id, (set, kind, length)) in LISTENERS.iter().enumerate() {
            batch.add(NEW_SET, NLM_F_CREATE | NLM_F_EXCL, |message| {
                message.string(1, table);
                message.string(2, set);
                message.be32(3, 0);
                message.be32(4, *kind);
                message.be32(5, *length);
                message.be32(10, (FAMILIES.len() + id) as u32 + 1);
            });
        }
        for (chain, hook) in [("in", HOOK_PREROUTING), ("out", HOOK_OUTPUT)] {
            batch.add(NEW_CHAIN, NLM_F_CREATE | NLM_F_EXCL, |message| {
                message.string(1, table);
                message.string(3, chain);
                message.nested(4, |hooks| {
                    hooks.be32(1, hook);
                    hooks.be32(2, PRIORITY as u32);
                });
                message.be32(5, ACCEPT);
                message.string(7, "filter");
            });
            if let Some(mark) = self.exempt_mark {
                rule(batch, table, chain, |list| {
                    meta(list, META_MARK, REGISTER);
                    equals(list, REGISTER, &mark.to_ne_bytes());
                    verdict(list, ACCEPT);
                });
            }
            for family in &FAMILIES {
                rule(batch, table, chain, |list| family.write_match(list));
            }
            if hook == HOOK_PREROUTING {
                let kinds: [(Match, &str); 2] = [(match_first_packet, "listen"), (match_datagram, "datagram")];
                for (matches, set) in kinds {
                    rule(batch, table, chain, |list| {
                        matches(list);
                        payload(list, TRANSPORT_HEADER, 2, 2, REGISTER);
                        lookup(list, set);
                        verdict(list, DROP);
                    });
                    for family in &FAMILIES {
                        rule(batch, table, chain, |list| {
                            family.write_listener_match(list, matches, set)
                        });
                    }
                }
            }
        }
    }
}

/// Removes a table of [`NetworkLock::lasting_in_current_netns`]; `false` when there is none.
///
/// # Errors
/// When the kernel refuses.
pub fn remove_table(name: &str) -> Result<bool, NftError> {
    let socket = Socket::new(libc::NETLINK_NETFILTER).map_err(NftError::Socket)?;
    let mut batch = Batch::new();
    batch.add(DELETE_TABLE, 0, |message| message.string(1, name));
    match batch.run(&socket) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(source) => Err(NftError::Change {
            what: "unlock connections",
            table: name.to_owned(),
            source,
        }),
    }
}

/// Whether a table exists in family inet of the current network namespace.
///
/// # Errors
/// When the kernel cannot be asked.
pub fn table_exists(table: &str) -> io::Result<bool> {
    let socket = Socket::new(libc::NETLINK_NETFILTER)?;
    let mut writer = Writer::default();
    let kind = SUBSYSTEM << 8 | GET_TABLE;
    writer.message(kind, NLM_F_REQUEST | NLM_F_ACK, 1, &general(0), |message| {
        message.string(1, table)
    });
    socket.send(&writer.finish())?;
    let mut buffer = Vec::new();
    let message = Messages(socket.receive(&mut buffer)?)
        .next()
        .ok_or_else(|| truncated("answer"))??;
    match (message.kind == NLMSG_ERROR).then(|| message.error()).flatten() {
        Some(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Some(error) => Err(error),
        None => Ok(true),
    }
}

fn taken(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EEXIST | libc::EPERM))
}

/// How packets of an address family are recognized.
struct Family {
    set: &'static str,
    number: i32,
    address: u32,
    /// Offset of the source address in the network header; the destination follows it.
    offset: u32,
    /// nft's number for the type of an address, so that its listing of the set can be read.
    kind: u32,
    /// Its number in names of sets.
    digit: char,
}

/// Sets of listening sockets and of those of datagrams, with type and length of their keys.
const LISTENERS: [(&str, u32, u32); 6] = [
    ("datagram", KIND_PORT, 4),
    ("datagram4", 7 << 6 | KIND_PORT, 8),
    ("datagram6", 8 << 6 | KIND_PORT, 20),
    ("listen", KIND_PORT, 4),
    ("listen4", 7 << 6 | KIND_PORT, 8),
    ("listen6", 8 << 6 | KIND_PORT, 20),
];
/// nft's number for the type of a port.
const KIND_PORT: u32 = 13;

const FAMILIES: [Family; 2] = [
    Family {
        set: "v4",
        number: libc::AF_INET,
        address: 4,
        offset: 12,
        kind: 7,
        digit: '4',
    },
    Family {
        set: "v6",
        number: libc::AF_INET6,
        address: 16,
        offset: 8,
        kind: 8,
        digit: '6',
    },
];

impl Family {
    fn key_len(&self) -> u32 {
        2 * self.address + 3 * 4
    }

    fn key_type(&self) -> u32 {
        let (port, protocol) = (KIND_PORT, 12);
        [self.kind, self.kind, port, port, protocol]
            .into_iter()
            .fold(0, |kinds, kind| kinds << 6 | kind)
    }

    fn write_match(&self, list: &mut Writer) {
        let words = self.address / 4;
        meta(list, META_FAMILY, REGISTER);
        equals(list, REGISTER, &[self.number as u8]);
        payload(list, NETWORK_HEADER, self.offset, self.address, REGISTER);
        payload(
            list,
            NETWORK_HEADER,
            self.offset + self.address,
            self.address,
            REGISTER + words,
        );
        payload(list, TRANSPORT_HEADER, 0, 2, REGISTER + 2 * words);
        payload(list, TRANSPORT_HEADER, 2, 2, REGISTER + 2 * words + 1);
        meta(list, META_PROTOCOL, REGISTER + 2 * words + 2);
        lookup(list, self.set);
        verdict(list, DROP);
    }

    fn write_listener_match(&self, list: &mut Writer, matches: Match, set: &str) {
        meta(list, META_FAMILY, REGISTER);
        equals(list, REGISTER, &[self.number as u8]);
        matches(list);
        payload(list, NETWORK_HEADER, self.offset + self.address, self.address, REGISTER);
        payload(list, TRANSPORT_HEADER, 2, 2, REGISTER + self.address / 4);
        lookup(list, &format!("{set}{}", self.digit));
        verdict(list, DROP);
    }
}

/// Writes what a rule goes on only for.
type Match = fn(&mut Writer);

/// Goes on only with a packet of TCP that has SYN and none of FIN, RST and ACK.
fn match_first_packet(list: &mut Writer) {
    meta(list, META_PROTOCOL, REGISTER);
    equals(list, REGISTER, &[libc::IPPROTO_TCP as u8]);
    payload(list, TRANSPORT_HEADER, 13, 1, REGISTER);
    expression(list, "bitwise", |data| {
        data.be32(1, REGISTER);
        data.be32(2, REGISTER);
        data.be32(3, 1);
        data.nested(4, |mask| mask.bytes(1, &[TCP_FLAGS]));
        data.nested(5, |xor| xor.bytes(1, &[0]));
    });
    equals(list, REGISTER, &[TCP_SYN]);
}

/// Goes on only with a datagram of UDP.
fn match_datagram(list: &mut Writer) {
    meta(list, META_PROTOCOL, REGISTER);
    equals(list, REGISTER, &[libc::IPPROTO_UDP as u8]);
}

fn lookup(list: &mut Writer, set: &str) {
    expression(list, "lookup", |data| {
        data.string(1, set);
        data.be32(2, REGISTER);
    });
}

/// An element of a set: its parts one after the other, each padded to four bytes, as they come to lie in the registers.
fn key(source: &[u8], destination: &[u8], from: u16, to: u16, protocol: u8) -> Vec<u8> {
    let ([from_high, from_low], [to_high, to_low]) = (from.to_be_bytes(), to.to_be_bytes());
    let rest = [from_high, from_low, 0, 0, to_high, to_low, 0, 0, protocol, 0, 0, 0];
    [source, destination, &rest].concat()
}

fn write_elements(batch: &mut Batch, table: &str, set: &str, keys: &[Vec<u8>]) {
    batch.add(NEW_ELEMENT, NLM_F_CREATE, |message| {
        message.string(1, table);
        message.string(2, set);
        message.nested(3, |list| {
            for key in keys {
                list.nested(1, |element| element.nested(1, |data| data.bytes(1, key)));
            }
        });
    });
}

fn rule(batch: &mut Batch, table: &str, chain: &str, expressions: impl FnOnce(&mut Writer)) {
    batch.add(NEW_RULE, NLM_F_CREATE | NLM_F_APPEND, |message| {
        message.string(1, table);
        message.string(2, chain);
        message.nested(4, expressions);
    });
}

fn expression(list: &mut Writer, name: &str, data: impl FnOnce(&mut Writer)) {
    list.nested(1, |element| {
        element.string(1, name);
        element.nested(2, data);
    });
}

fn meta(list: &mut Writer, key: u32, register: u32) {
    expression(list, "meta", |data| {
        data.be32(1, register);
        data.be32(2, key);
    });
}

fn payload(list: &mut Writer, base: u32, offset: u32, len: u32, register: u32) {
    expression(list, "payload", |data| {
        data.be32(1, register);
        data.be32(2, base);
        data.be32(3, offset);
        data.be32(4, len);
    });
}

fn equals(list: &mut Writer, register: u32, value: &[u8]) {
    expression(list, "cmp", |data| {
        data.be32(1, register);
        data.be32(2, 0);
        data.nested(3, |inner| inner.bytes(1, value));
    });
}

fn verdict(list: &mut Writer, code: u32) {
    expression(list, "immediate", |data| {
        data.be32(1, REGISTER_VERDICT);
        data.nested(2, |inner| inner.nested(2, |verdict| verdict.be32(1, code)));
    });
}

/// `struct nfgenmsg`.
fn general(resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [FAMILY_INET, 0, high, low]
}

/// Changes that the kernel makes all together or not at all.
struct Batch {
    writer: Writer,
    sequence: u32,
}

impl Batch {
    fn new() -> Self {
        let mut writer = Writer::default();
        writer.message(BATCH_BEGIN, NLM_F_REQUEST, 0, &general(SUBSYSTEM), |_| {});
        Self { writer, sequence: 0 }
    }

    fn add(&mut self, operation: u16, flags: u16, body: impl FnOnce(&mut Writer)) {
        self.sequence += 1;
        let kind = SUBSYSTEM << 8 | operation;
        self.writer.message(
            kind,
            NLM_F_REQUEST | NLM_F_ACK | flags,
            self.sequence,
            &general(0),
            body,
        );
    }

    /// Sends the batch and waits for its acknowledgements. The first error counts; those after it follow from it.
    fn run(mut self, socket: &Socket) -> io::Result<()> {
        self.writer
            .message(BATCH_END, NLM_F_REQUEST, self.sequence + 1, &general(SUBSYSTEM), |_| {});
        socket.send(&self.writer.finish())?;
        let (mut buffer, mut first) = (Vec::new(), None);
        let mut acknowledged = 0;
        while acknowledged < self.sequence {
            for message in Messages(socket.receive(&mut buffer)?) {
                let message = message?;
                if message.kind != NLMSG_ERROR {
                    continue;
                }
                let error = message.error();
                // An error of the batch as a whole carries the number of its frame and is the only answer.
                if !(1..=self.sequence).contains(&message.sequence) {
                    return Err(error.unwrap_or_else(|| io::Error::other("stray acknowledgement")));
                }
                acknowledged += 1;
                first = first.or(error);
            }
        }
        first.map_or(Ok(()), Err)
    }
}

#[cfg(test)]
#[path = "nft_tests.rs"]
pub(crate) mod tests;
