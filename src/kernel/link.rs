//! Network devices for hosts that are made out of namespaces: bridges, veth pairs, addresses.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;

use super::netlink::{Messages, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NLMSG_ERROR, Socket, Writer};

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_PID: u16 = 19;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFF_UP: u32 = 1;
/// Size of struct ifinfomsg.
const INFO: usize = 16;

fn request(kind: u16, flags: u16, fixed: &[u8], attributes: impl FnOnce(&mut Writer)) -> io::Result<()> {
    let mut writer = Writer::default();
    writer.message(kind, NLM_F_REQUEST | NLM_F_ACK | flags, 1, fixed, attributes);
    let socket = Socket::new(libc::NETLINK_ROUTE)?;
    socket.send(&writer.finish())?;
    let mut buffer = Vec::new();
    for message in Messages(socket.receive(&mut buffer)?) {
        let message = message?;
        if message.kind == NLMSG_ERROR {
            return message.error().map_or(Ok(()), Err);
        }
    }
    Ok(())
}

/// struct ifinfomsg: family, type, index, flags, mask.
fn info(index: u32, up: bool) -> Vec<u8> {
    let mut fixed = vec![0u8; INFO];
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    if up {
        fixed[8..12].copy_from_slice(&IFF_UP.to_ne_bytes());
        fixed[12..16].copy_from_slice(&IFF_UP.to_ne_bytes());
    }
    fixed
}

/// Index of a device of the current network namespace.
///
/// # Errors
/// ENODEV when there is none.
pub fn index(name: &str) -> io::Result<u32> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    Ok(rustix::net::netdevice::name_to_index(socket, name)?)
}

/// Makes a bridge with a hardware address of its own, and sets it up. Without one it has that of a port, and another one when
/// that port goes: hosts that know the old one then send to nobody.
///
/// # Errors
/// EEXIST, EPERM, EOPNOTSUPP where the kernel has no bridges.
pub fn add_bridge(name: &str, hardware_address: [u8; 6]) -> io::Result<()> {
    request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &info(0, true), |link| {
        link.string(IFLA_IFNAME, name);
        link.bytes(IFLA_ADDRESS, &hardware_address);
        link.nested(IFLA_LINKINFO, |info| info.string(IFLA_INFO_KIND, "bridge"));
    })
}

/// Makes a pair of devices: `name` here, up and in bridge `master`; `peer` in the network namespace of process `pid`.
///
/// # Errors
/// EEXIST, EPERM, EOPNOTSUPP where the kernel has no veth.
pub fn add_veth(name: &str, master: &str, peer: &str, pid: i32) -> io::Result<()> {
    let master = index(master)?;
    request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &info(0, true), |link| {
        link.string(IFLA_IFNAME, name);
        link.bytes(IFLA_MASTER, &master.to_ne_bytes());
        link.nested(IFLA_LINKINFO, |info| {
            info.string(IFLA_INFO_KIND, "veth");
            info.nested(IFLA_INFO_DATA, |data| {
                // The peer's attribute holds a struct ifinfomsg, then attributes.
                let mut inner = Writer::default();
                inner.string(IFLA_IFNAME, peer);
                inner.bytes(IFLA_NET_NS_PID, &(pid as u32).to_ne_bytes());
                let mut value = vec![0u8; INFO];
                value.extend(inner.finish());
                data.bytes(VETH_INFO_PEER, &value);
            });
        });
    })
}

/// Sets a device up.
///
/// # Errors
/// ENODEV, EPERM.
pub fn set_up(name: &str) -> io::Result<()> {
    request(RTM_NEWLINK, 0, &info(index(name)?, true), |_| {})
}

/// Adds an address to a device.
///
/// # Errors
/// ENODEV, EEXIST, EPERM.
pub fn add_address(name: &str, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
    let mut fixed = vec![libc::AF_INET as u8, prefix, 0, 0];
    fixed.extend(index(name)?.to_ne_bytes());
    request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, &fixed, |message| {
        message.bytes(IFA_LOCAL, &address.octets());
        message.bytes(IFA_ADDRESS, &address.octets());
    })
}

/// Runs `work` on a thread in the network namespace of process `pid`.
///
/// # Errors
/// When the namespace cannot be entered, or the work fails.
pub fn in_network_of<T: Send>(pid: i32, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            let kind = rustix::thread::LinkNameSpaceType::Network;
            rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(kind))?;
            work()
        });
        thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    })
}

/// Gives this process a network namespace of its own. To be called while it has one thread.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN.
pub fn unshare_network() -> io::Result<()> {
    // SAFETY: unshare(2) of the network namespace changes nothing that Rust code relies on.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
