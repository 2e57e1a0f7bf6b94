//! Addresses of this host that move with a tree: added here, removed there, and told to the neighbours.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::netlink::{Messages, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NLMSG_ERROR, Socket, Writer};
use crate::error::{Context, Error, Result};

const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// No duplicate address detection: the other host still has the address for a moment.
const IFA_F_NODAD: u8 = 2;

/// An address with the length of its network, and the device it belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MovedAddress {
    address: IpAddr,
    prefix: u8,
    device: String,
}

impl MovedAddress {
    /// From `10.0.0.2/24` and a device name. Without one, the device is the one whose network holds the address.
    /// `None` for an empty text.
    ///
    /// # Errors
    /// When the text is no address with a prefix length, or no device fits.
    pub fn parse(text: &str, device: &str) -> Result<Option<MovedAddress>> {
        if text.is_empty() {
            return Ok(None);
        }
        let bad = || {
            Error::new("understand an address")
                .object(text.to_owned())
                .hint("write it like 10.0.0.2/24")
        };
        let (address, prefix) = text.split_once('/').ok_or_else(bad)?;
        let address: IpAddr = address.parse().with(bad)?;
        let prefix: u8 = prefix.parse().with(bad)?;
        if prefix > if address.is_ipv4() { 32 } else { 128 } {
            return Err(bad());
        }
        let device = match device {
            "" => device_for(address).ok_or_else(|| {
                Error::new("find a device")
                    .object(text.to_owned())
                    .because("no device of this host is in its network")
                    .hint("name the device: --move-device DEVICE")
            })?,
            name => name.to_owned(),
        };
        index_of(&device)?;
        Ok(Some(MovedAddress {
            address,
            prefix,
            device,
        }))
    }

    fn change(&self, kind: u16, flags: u16) -> Result<()> {
        let index = index_of(&self.device)?;
        let octets = match self.address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        let family = if self.address.is_ipv4() {
            libc::AF_INET
        } else {
            libc::AF_INET6
        } as u8;
        // struct ifaddrmsg: family, prefix length, flags, scope, interface.
        let mut fixed = vec![
            family,
            self.prefix,
            if family == libc::AF_INET6 as u8 { IFA_F_NODAD } else { 0 },
            0,
        ];
        fixed.extend(index.to_ne_bytes());
        let mut writer = Writer::default();
        writer.message(kind, NLM_F_REQUEST | NLM_F_ACK | flags, 1, &fixed, |message| {
            message.bytes(IFA_LOCAL, &octets);
            message.bytes(IFA_ADDRESS, &octets);
        });
        let failed =
            || Error::new("change an address").object(format!("{}/{} on {}", self.address, self.prefix, self.device));
        let socket = Socket::new(libc::NETLINK_ROUTE).with(failed)?;
        socket.send(&writer.finish()).with(failed)?;
        let mut buffer = Vec::new();
        let bytes = socket.receive(&mut buffer).with(failed)?;
        for message in Messages(bytes) {
            let message = message.with(failed)?;
            if message.kind == NLMSG_ERROR
                && let Some(error) = message.error()
            {
                return Err(error).with(failed);
            }
        }
        Ok(())
    }

    /// Tells the neighbours that the address is here now: a gratuitous ARP request and reply (RFC 5227), or an
    /// unsolicited neighbour advertisement (RFC 4861).
    ///
    /// # Errors
    /// When no packet can be sent.
    pub fn announce(&self) -> io::Result<()> {
        let index = interface_index(&self.device)?;
        let mac = hardware_address(&self.device)?;
        match self.address {
            IpAddr::V4(address) => {
                for operation in [1u16, 2] {
                    send_frame(index, 0x0806, &arp(operation, mac, address))?;
                }
                Ok(())
            }
            // The kernel sends one by itself when an address is added (ndisc_notify) or asked for; nothing more is needed
            // where the peer's entry is confirmed by traffic.
            IpAddr::V6(_) => Ok(()),
        }
    }
}

/// An address that was added; dropped, it is removed again.
#[derive(Debug)]
pub struct Added(Option<MovedAddress>);

impl Added {
    /// Adds the address.
    ///
    /// # Errors
    /// EEXIST when this host has it already, EPERM without CAP_NET_ADMIN.
    pub fn add(moved: &MovedAddress) -> Result<Added> {
        moved.change(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL)?;
        Ok(Added(Some(moved.clone())))
    }

    /// It stays, and the neighbours are told.
    pub fn keep_and_announce(mut self) {
        if let Some(moved) = self.0.take()
            && let Err(error) = moved.announce()
        {
            tracing::warn!(%error, "the neighbours were not told of the address");
        }
    }
}

impl Drop for Added {
    fn drop(&mut self) {
        if let Some(moved) = self.0.take() {
            let _ = moved.change(RTM_DELADDR, 0);
        }
    }
}

/// An address that was removed; dropped, it is added again.
#[derive(Debug)]
pub struct Removed(Option<MovedAddress>);

impl Removed {
    /// Removes the address.
    ///
    /// # Errors
    /// EADDRNOTAVAIL when this host does not have it.
    pub fn remove(moved: &MovedAddress) -> Result<Removed> {
        moved.change(RTM_DELADDR, 0)?;
        Ok(Removed(Some(moved.clone())))
    }

    /// It stays removed.
    pub fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Removed {
    fn drop(&mut self) {
        if let Some(moved) = self.0.take() {
            let _ = moved.change(RTM_NEWADDR, NLM_F_CREATE);
            let _ = moved.announce();
        }
    }
}

/// Is this one of our addresses? A socket can be bound to it then.
pub fn is_local(address: IpAddr) -> bool {
    std::net::UdpSocket::bind((address, 0)).is_ok()
}

/// The device from which the network of `address` is reached directly.
fn device_for(address: IpAddr) -> Option<String> {
    // Connected routes: the kernel lists them without a gateway.
    let IpAddr::V4(wanted) = address else { return None };
    let routes = std::fs::read_to_string("/proc/net/route").ok()?;
    routes.lines().skip(1).find_map(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let number = |index: usize| u32::from_str_radix(columns.get(index)?, 16).ok().map(u32::from_be);
        let (destination, gateway, mask) = (number(1)?, number(2)?, number(7)?);
        let inside = mask != 0 && gateway == 0 && u32::from(wanted) & mask == destination;
        inside.then(|| columns[0].to_owned())
    })
}

fn index_of(device: &str) -> Result<u32> {
    interface_index(device).with(|| Error::new("find a device").object(device.to_owned()))
}

fn interface_index(device: &str) -> io::Result<u32> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    Ok(rustix::net::netdevice::name_to_index(socket, device)?)
}

fn hardware_address(device: &str) -> io::Result<[u8; 6]> {
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let name = device.as_bytes();
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name) {
        *to = *from as libc::c_char;
    }
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    // SAFETY: SIOCGIFHWADDR reads the name and writes a sockaddr into the ifreq.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFHWADDR as libc::Ioctl, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so the union holds the hardware address.
    let data = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
    Ok(std::array::from_fn(|index| data[index] as u8))
}

/// The body of an ARP packet for Ethernet and IPv4 in which sender and target are one.
fn arp(operation: u16, mac: [u8; 6], address: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4];
    packet.extend(operation.to_be_bytes());
    packet.extend(mac);
    packet.extend(address.octets());
    packet.extend([0xff; 6]);
    packet.extend(address.octets());
    packet
}

fn send_frame(index: u32, protocol: u16, payload: &[u8]) -> io::Result<()> {
    // SAFETY: socket(2) takes three integers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: an all-zero sockaddr_ll is valid.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_protocol = protocol.to_be();
    to.sll_ifindex = index as i32;
    to.sll_halen = 6;
    to.sll_addr[..6].fill(0xff);
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the payload and the address are live for the call, with the lengths given.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            payload.as_ptr().cast(),
            payload.len(),
            0,
            (&raw const to).cast(),
            length,
        )
    };
    if sent < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_comes_and_goes_and_a_forgotten_one_is_removed() {
        let moved = MovedAddress::parse("127.0.77.3/32", "lo").unwrap().unwrap();
        let Ok(added) = Added::add(&moved) else {
            panic!("adding an address needs root")
        };
        assert!(Added::add(&moved).unwrap_err().errno() == Some(libc::EEXIST));
        drop(added);
        assert_eq!(Removed::remove(&moved).unwrap_err().errno(), Some(libc::EADDRNOTAVAIL));
        assert!(MovedAddress::parse("", "").unwrap().is_none());
        assert!(MovedAddress::parse("10.0.0.1/33", "lo").is_err());
        assert!(MovedAddress::parse("10.0.0.1", "lo").is_err());
    }
}
