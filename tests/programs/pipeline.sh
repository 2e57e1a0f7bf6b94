# A shell pipeline that counts, with a dead child that nobody waits for: LOG.
(sh -c 'exit 7' & exec sleep 100000) &
n=0
while :; do
    n=$((n + 1))
    echo "$n"
    sleep 0.01
done | cat | {
    last=0
    echo "ready $$" >> "$1"
    while read -r n; do
        if [ "$n" != $((last + 1)) ]; then echo "wrong: $n after $last" >> "$1"; fi
        last=$n
        read -r host < /proc/sys/kernel/hostname
        echo "ok $n $host" >> "$1"
    done
}
