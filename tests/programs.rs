//! Real programs move with their clients, in one way after the other, and both say that nothing was lost.
//!
//! Each program is started once, on the first of two hosts, with clients on a third that keep their connections through
//! all moves and check every answer. `WHIMBREL_PROGRAMS_FLAVOURS` picks ways to move, by words of their names.

mod common;

use std::path::{Path, PathBuf};

use common::Victim;
use common::flavour::{FLAVOURS, Failure, Moving};
use common::host::MOVING;
use common::place::{Place, Way};
use common::victim::{PYTHON, start_daemon};

/// The flavours in which programs are moved, one after the other, and where each goes.
const JOURNEY: [(&str, Way); 5] = [
    ("dump + restore", Way::Stays),
    ("lazily", Way::Stays),
    ("page server", Way::Stays),
    ("pre-copy", Way::There),
    ("post-copy", Way::Back),
];

const MIGRATE: [&str; 2] = ["--move-address", "10.77.0.100/24"];

/// A program with its clients.
struct Served<'a> {
    name: &'a str,
    place: &'a Place,
    pid: i32,
    directory: PathBuf,
    clients: &'a Victim,
}

impl Moving for Served<'_> {
    fn name(&self) -> String {
        self.name.to_owned()
    }

    fn place(&self) -> &Place {
        self.place
    }

    fn pid(&self) -> i32 {
        self.pid
    }

    fn directory(&self) -> &Path {
        &self.directory
    }

    fn words(&self, verb: &str) -> Vec<&str> {
        if verb == "migrate" {
            return MIGRATE.to_vec();
        }
        vec!["--tcp-established"]
    }

    fn is_the_same(&self) -> Result<(), Failure> {
        self.clients.goes_on(self.place.client());
        Ok(())
    }
}

fn can_run(needs: &[&str]) -> bool {
    if let Some(missing) = needs.iter().find(|program| !common::installed(program)) {
        common::skip(&format!("programs: {missing} is not installed"));
        return false;
    }
    common::can_make_hosts() && common::has_python()
}

/// Takes a program through all flavours. `words` make its command line, given a directory of its own.
fn moves(name: &str, port: u16, clients: &str, words: impl FnOnce(&Path) -> Vec<String>) {
    assert!(MIGRATE[1].starts_with(MOVING));
    let mut place = Place::for_all();
    let directory = place.directory("program");
    let words = words(&directory);
    let errors = directory.join("errors");
    let pid = start_daemon(place.source(), &directory, &words, &errors);
    common::wait_or(
        || {
            let table = ["tcp", "tcp6"].map(|table| place.source().read_proc(pid, &format!("net/{table}")));
            // sl, local address (hexadecimal address:port), remote address, state: 0A listens.
            let listens = |line: &str| line.contains(&format!(":{port:04X} ")) && line.contains(" 0A ");
            table.iter().flat_map(|table| table.lines()).any(listens).then_some(())
        },
        || {
            let said = std::fs::read_to_string(&errors).unwrap_or_default();
            format!("{name} listens; it says {said}")
        },
    );
    let home = place.directory("clients");
    let port = port.to_string();
    // A connection that the program has not accepted yet cannot be carried (README): in a move none is made.
    let quiet = home.join("quiet");
    let code = std::fs::read_to_string(common::program(&format!("real/{clients}"))).unwrap();
    let clients = Victim::start_code(
        place.client(),
        &home,
        clients,
        &code,
        &[MOVING, &port, &quiet.display().to_string()],
    );
    clients.goes_on(place.client());
    let wanted = std::env::var("WHIMBREL_PROGRAMS_FLAVOURS").unwrap_or_default();
    for (number, (flavour, way)) in JOURNEY.into_iter().enumerate() {
        if !flavour.contains(&wanted) {
            continue;
        }
        place.goes(way);
        let moving = Served {
            name,
            place: &place,
            pid,
            directory: place.directory(&format!("move-{number}")),
            clients: &clients,
        };
        std::fs::write(&quiet, "").unwrap();
        clients.goes_on(place.client());
        let go = FLAVOURS.iter().find(|known| known.name == flavour).unwrap().go;
        let begun = std::time::Instant::now();
        if let Err(failure) = go(&moving) {
            let said = std::fs::read_to_string(&errors).unwrap_or_default();
            panic!("{name}, {flavour}: {}\nthe program says: {said}", failure.text);
        }
        std::fs::remove_file(&quiet).unwrap();
        // Whatever the flavour looked at: the clients have been served since.
        clients.goes_on(place.client());
        for host in [place.source(), place.destination()] {
            host.has_no_network_lock(flavour);
        }
        println!("{name}: {flavour} in {:?}", begun.elapsed());
    }
    drop(clients);
    place.clean();
}

fn real(name: &str) -> String {
    common::program(&format!("real/{name}")).display().to_string()
}

fn owned(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

#[test]
fn memcached_moves_with_its_clients() {
    if can_run(&["memcached"]) {
        let words = [
            "memcached",
            "-u",
            "root",
            "-l",
            "0.0.0.0",
            "-p",
            "11211",
            "-m",
            "32",
            "-t",
            "4",
        ];
        moves("memcached", 11211, "memcached_client.py", |_| owned(&words));
    }
}

#[test]
fn a_python_service_of_asyncio_with_threads_moves_with_its_clients() {
    if can_run(&[]) {
        moves("asyncio", 9001, "service_client.py", |_| {
            owned(&[PYTHON, "-B", &real("asyncio_server.py"), "9001"])
        });
    }
}

#[test]
fn a_node_service_with_a_worker_moves_with_its_clients() {
    if can_run(&["node"]) {
        moves("node", 9001, "service_client.py", |_| {
            owned(&["node", &real("service.js"), "9001"])
        });
    }
}

#[test]
fn a_rust_service_of_tokio_moves_with_its_clients() {
    if can_run(&[]) {
        moves("tokio", 9001, "service_client.py", |_| {
            let built = std::process::Command::new(env!("CARGO"))
                .args(["build", "--quiet", "--example", "service", "--manifest-path"])
                .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
                .status()
                .unwrap();
            assert!(built.success(), "cargo: {built}");
            let service = Path::new(env!("CARGO_BIN_EXE_whimbrel")).with_file_name("examples/service");
            owned(&[&service.display().to_string(), "9001"])
        });
    }
}

#[test]
fn a_java_service_moves_with_its_clients() {
    if can_run(&["java", "javac"]) {
        moves("java", 9001, "service_client.py", |directory| {
            let classes = directory.display().to_string();
            let built = std::process::Command::new("javac")
                .args(["-d", &classes, &real("Service.java")])
                .status()
                .unwrap();
            assert!(built.success(), "javac: {built}");
            owned(&["java", "-Xmx64m", "-cp", &classes, "Service", "9001"])
        });
    }
}

#[test]
fn nginx_moves_under_load() {
    if can_run(&["nginx"]) {
        moves("nginx", 8080, "nginx_client.py", |directory| {
            let home = directory.display();
            let noise: Vec<u8> = (0u32..2_000_000)
                .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
                .collect();
            std::fs::write(directory.join("large"), &noise).unwrap();
            std::fs::write(directory.join("small"), &noise[..10_000]).unwrap();
            let configuration = format!(
                "daemon off; user root; worker_processes 2; pid {home}/nginx.pid; error_log {home}/log;\n\
                 events {{ worker_connections 256; }}\n\
                 http {{ access_log off; keepalive_requests 1000000; keepalive_timeout 600; client_body_temp_path {home}/body;\n\
                 server {{ listen 8080; root {home}; }} }}\n"
            );
            let path = directory.join("nginx.conf");
            std::fs::write(&path, configuration).unwrap();
            owned(&["nginx", "-p", &home.to_string(), "-c", &path.display().to_string()])
        });
    }
}
