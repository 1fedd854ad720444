# What up, down and load share; sourced, never run.
state=${ONCEFS_CLUSTER:-/var/lib/oncefs-cluster}
export KUBECONFIG=$state/kubeconfig
containerd_socket=$state/containerd.sock

if [ "$(id -u)" -ne 0 ]; then
	echo "$(basename "$0"): NOT RUN: a cluster of one's own needs root; name another with KUBECONFIG" >&2
	exit 1
fi

kubectl() { "$state/bin/kubectl" "$@"; }
ctr() { "$state/bin/ctr" -a "$containerd_socket" -n k8s.io "$@"; }

# alive NAME: the part that start started is still running, and no other process
# has its number: all of them work in that directory.
alive() {
	local pid
	pid=$(cat "$state/pid/$1" 2>/dev/null) && [ "$(readlink "/proc/$pid/cwd")" = "$(readlink -f "$state")" ]
}

# until_true WHAT SECONDS COMMAND...: asks again until the command succeeds. It is
# for what tells nobody when it is ready.
until_true() {
	local what=$1 end=$((SECONDS + $2)) never
	shift 2
	exec {never}<> <(:)
	until "$@" >/dev/null 2>&1; do
		if [ $SECONDS -ge $end ]; then
			echo "$what: waited in vain" >&2
			exec {never}<&-
			return 1
		fi
		read -rt 0.2 -u "$never" || true
	done
	exec {never}<&-
}
