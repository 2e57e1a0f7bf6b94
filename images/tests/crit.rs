//! `crit`, CRIU's own tool, reads what this crate writes. Needs `crit` in the path; its release 3.17 is enough.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use whimbrel_images::entry::{ImageWriter, write_one};
use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageRun, PageSink};
use whimbrel_images::proto;
use whimbrel_images::sink::DirPageSink;
use whimbrel_images::store::DirStore;

#[test]
fn crit_decodes_what_this_crate_writes() {
    if let Err(error) = Command::new("crit").arg("--help").output() {
        println!("skipped: crit cannot be run: {error}");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(DirStore::open(directory.path()).unwrap());
    write_images(&store);
    write_pages(&store);

    expect(
        directory.path(),
        "inventory.img",
        &[r#""magic": "INVENTORY""#, r#""img_version": 2"#, r#""vm_id": 1"#],
    );
    expect(
        directory.path(),
        "pstree.img",
        &[r#""pid": 30495"#, r#""threads": [30495, 30497]"#, r#""pid": 30498"#],
    );
    let core = [
        r#""mtype": "X86_64""#,
        r#""comm": "python3""#,
        r#""ip": "0x41f000""#,
        r#""mode": "NATIVE""#,
    ];
    expect(directory.path(), "core-30495.img", &core);
    expect(
        directory.path(),
        "mm-30495.img",
        &[r#""start": "0x400000""#, r#""status": "VMA_AREA_REGULAR | "#],
    );
    expect(
        directory.path(),
        "files.img",
        &[r#""type": "REG""#, r#""name": "/etc/passwd""#, r#""id": 4"#],
    );
    expect(directory.path(), "fdinfo-2.img", &[r#""fd": 3"#, r#""type": "REG""#]);
    // The bytes are the words "in the pipe" in base64.
    expect(
        directory.path(),
        "pipes-data.img",
        &[r#""pipe_id": 1887985"#, r#""extra": "aW4gdGhlIHBpcGU="#],
    );
    expect(
        directory.path(),
        "tcp-stream-1ccef6.img",
        &[r#""inq_len": 6"#, r#""inq": "dW5yZWFk"#, r#""outq": """#],
    );
    expect(
        directory.path(),
        "ghost-file-1.img",
        &[r#""mode": 33152"#, r#""extra": "Z2hvc3Q="#],
    );
    expect(
        directory.path(),
        "stats-dump",
        &[r#""magic": "STATS""#, r#""pages_written": 2722"#],
    );
    // Releases before 4.2 call the old count nr_pages and do not know the new one.
    let pagemap = [
        r#""pages_id": 1"#,
        r#""vaddr": "0x41f000""#,
        r#"nr_pages": 98"#,
        r#""flags": "PE_PRESENT""#,
        r#""flags": "PE_LAZY | PE_PRESENT""#,
        r#""flags": "PE_PARENT""#,
    ];
    expect(directory.path(), "pagemap-30495.img", &pagemap);
    expect(
        directory.path(),
        "pagemap-shmem-29151.img",
        &[r#""pages_id": 2"#, r#""vaddr": "0x0""#],
    );
    explore(directory.path(), "ps", &["30495", "30498", "python3"]);
    explore(directory.path(), "mems", &["00400000-0041f000", "/etc/passwd"]);
}

fn write_images(store: &DirStore) {
    let ids = proto::TaskKobjIdsEntry {
        vm_id: 1,
        files_id: 2,
        fs_id: 1,
        sighand_id: 1,
        ..Default::default()
    };
    let inventory = proto::InventoryEntry {
        img_version: 2,
        fdinfo_per_id: Some(true),
        root_ids: Some(ids),
        ..Default::default()
    };
    write_one(store, "inventory.img", &inventory).unwrap();

    let mut pstree = ImageWriter::create(store, "pstree.img").unwrap();
    for (pid, ppid, threads) in [(30495, 0, vec![30495, 30497]), (30498, 30495, vec![30498])] {
        pstree
            .write(&proto::PstreeEntry {
                pid,
                ppid,
                pgid: pid,
                sid: pid,
                threads,
                exit_signal: None,
            })
            .unwrap();
        let vma = proto::VmaEntry {
            start: 0x400000,
            end: 0x41f000,
            status: 0x201,
            ..Default::default()
        };
        let vma = proto::VmaEntry {
            prot: 3,
            flags: 0x22,
            fd: -1,
            ..vma
        };
        let mm = proto::MmEntry {
            exe_file_id: 4,
            vmas: vec![vma],
            ..Default::default()
        };
        write_one(store, &format!("mm-{pid}.img"), &mm).unwrap();
        write_one(store, &format!("core-{pid}.img"), &core()).unwrap();
        write_one(store, &format!("ids-{pid}.img"), &ids).unwrap();
        write_one(
            store,
            &format!("fs-{pid}.img"),
            &proto::FsEntry {
                cwd_id: 4,
                root_id: 4,
                ..Default::default()
            },
        )
        .unwrap();
    }
    write_one(store, "core-30497.img", &core()).unwrap();
    pstree.finish().unwrap();

    let reg = proto::RegFileEntry {
        id: 4,
        name: "/etc/passwd".into(),
        size: Some(1000),
        ..Default::default()
    };
    let kind = proto::FdTypes::Reg as i32;
    write_one(
        store,
        "files.img",
        &proto::FileEntry {
            r#type: kind,
            id: 4,
            reg: Some(reg),
            ..Default::default()
        },
    )
    .unwrap();
    let fdinfo = proto::FdinfoEntry {
        id: 4,
        r#type: kind,
        fd: 3,
        ..Default::default()
    };
    write_one(store, "fdinfo-2.img", &fdinfo).unwrap();

    let mut pipes = ImageWriter::create(store, "pipes-data.img").unwrap();
    pipes
        .write(&proto::PipeDataEntry {
            pipe_id: 1887985,
            bytes: 11,
            size: Some(65536),
            packets: Vec::new(),
        })
        .unwrap();
    pipes.extra(b"in the pipe").unwrap();
    pipes.finish().unwrap();
    let mut tcp = ImageWriter::create(store, "tcp-stream-1ccef6.img").unwrap();
    tcp.write(&proto::TcpStreamEntry {
        inq_len: 6,
        inq_seq: 2799663487,
        ..Default::default()
    })
    .unwrap();
    tcp.extra(b"unread").unwrap();
    tcp.finish().unwrap();
    let mut ghost = ImageWriter::create(store, "ghost-file-1.img").unwrap();
    ghost
        .write(&proto::GhostFileEntry {
            mode: 33152,
            ..Default::default()
        })
        .unwrap();
    ghost.extra(b"ghost").unwrap();
    ghost.finish().unwrap();
    let dump = proto::DumpStatsEntry {
        frozen_time: 30414,
        pages_written: 2722,
        ..Default::default()
    };
    write_one(
        store,
        "stats-dump",
        &proto::StatsEntry {
            dump: Some(dump),
            restore: None,
        },
    )
    .unwrap();
}

fn core() -> proto::CoreEntry {
    let gpregs = proto::UserX86RegsEntry {
        ip: 0x41f000,
        mode: Some(proto::UserX86RegsMode::Native as i32),
        ..Default::default()
    };
    proto::CoreEntry {
        mtype: proto::core_entry::March::X8664 as i32,
        thread_info: Some(proto::ThreadInfoX86 {
            gpregs,
            ..Default::default()
        }),
        tc: Some(proto::TaskCoreEntry {
            task_state: 1,
            comm: "python3".into(),
            ..Default::default()
        }),
        thread_core: Some(proto::ThreadCoreEntry {
            comm: Some("python3".into()),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn write_pages(store: &Arc<DirStore>) {
    let task = MemoryObject::Task(30495);
    let mut sink = DirPageSink::new(store.clone());
    sink.write_pages(
        task,
        PageRun {
            start: 0x945000,
            pages: 98,
        },
        &[7; 98 * PAGE_SIZE],
    )
    .unwrap();
    sink.mark_lazy(
        task,
        PageRun {
            start: 0x945000,
            pages: 98,
        },
    )
    .unwrap();
    sink.write_pages(
        task,
        PageRun {
            start: 0x41f000,
            pages: 1,
        },
        &[8; PAGE_SIZE],
    )
    .unwrap();
    sink.parent_pages(
        task,
        PageRun {
            start: 0x9a8000,
            pages: 2,
        },
    )
    .unwrap();
    sink.write_pages(
        MemoryObject::Shmem(29151),
        PageRun { start: 0, pages: 1 },
        &[9; PAGE_SIZE],
    )
    .unwrap();
    sink.finish().unwrap();
}

fn expect(directory: &Path, name: &str, wanted: &[&str]) {
    let output = Command::new("crit")
        .args(["decode", "--pretty", "-i"])
        .arg(directory.join(name))
        .output()
        .unwrap();
    check(name, output, wanted);
}

fn explore(directory: &Path, what: &str, wanted: &[&str]) {
    check(
        what,
        Command::new("crit").arg("x").arg(directory).arg(what).output().unwrap(),
        wanted,
    );
}

fn check(what: &str, output: std::process::Output, wanted: &[&str]) {
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{what}: {text}{errors}");
    // How the text is broken into lines differs from release to release.
    let dense = |text: &str| text.split_whitespace().collect::<String>();
    for wanted in wanted {
        assert!(
            dense(&text).contains(&dense(wanted)),
            "{what}: no {wanted} in {text}{errors}"
        );
    }
}
