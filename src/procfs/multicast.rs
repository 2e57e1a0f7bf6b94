//! `/proc/net/igmp` and `/proc/net/igmp6`: the multicast groups that a network namespace has joined, by interface.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A group on an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// The interface's index.
    pub interface: u32,
    /// Its name.
    pub device: String,
    /// The group's address.
    pub address: IpAddr,
}

/// Parses `/proc/net/igmp`. Lines that are not understood are left out.
pub fn parse_v4(text: &str) -> Vec<Group> {
    let (mut groups, mut current) = (Vec::new(), None);
    // A line of an interface, `2	eth0      :     1      V3`, then indented ones of its groups, `010000E0     1 0:00000000		0`.
    for line in text.lines().skip(1) {
        let mut words = line.split_whitespace();
        let (Some(first), second) = (words.next(), words.next()) else {
            continue;
        };
        if line.starts_with(|c: char| c.is_ascii_digit()) {
            let name = second.map(|name| name.trim_end_matches(':').to_owned());
            current = first.parse().ok().zip(name);
        } else if let (Some((interface, device)), Ok(word)) = (&current, u32::from_str_radix(first, 16)) {
            groups.push(Group {
                interface: *interface,
                device: device.clone(),
                // The word in memory is in network byte order; it is printed as a number of this machine.
                address: Ipv4Addr::from(word.to_ne_bytes()).into(),
            });
        }
    }
    groups
}

/// Parses `/proc/net/igmp6`. Lines that are not understood are left out.
pub fn parse_v6(text: &str) -> Vec<Group> {
    let line = |line: &str| {
        let mut words = line.split_whitespace();
        let (interface, device, address) = (words.next()?, words.next()?, words.next()?);
        Some(Group {
            interface: interface.parse().ok()?,
            device: device.to_owned(),
            address: Ipv6Addr::from(u128::from_str_radix(address, 16).ok()?).into(),
        })
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_read_with_their_interfaces() {
        let text = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
            1\tlo        :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n\
            12\teth0      :     2      V3\n\t\t\t\tFB0000E0     1 0:00000000\t\t0\n\t\t\t\t010000E0     1 0:00000000\t\t0\n";
        let found: Vec<(u32, String, String)> = parse_v4(text)
            .into_iter()
            .map(|group| (group.interface, group.device, group.address.to_string()))
            .collect();
        let group = |index, device: &str, address: &str| (index, device.to_owned(), address.to_owned());
        assert_eq!(
            found,
            [
                group(1, "lo", "224.0.0.1"),
                group(12, "eth0", "224.0.0.251"),
                group(12, "eth0", "224.0.0.1")
            ]
        );
        let text = "1    lo              ff020000000000000000000000000001     1 0000000C 0\n";
        let six = parse_v6(text).remove(0);
        assert_eq!((six.interface, six.address.to_string()), (1, "ff02::1".to_owned()));
        assert_eq!(parse_v4(""), []);
        assert_eq!(parse_v6("nonsense\n1 lo zz\n"), []);
    }
}
