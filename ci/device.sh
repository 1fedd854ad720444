# What runs that let plain users and pods mount share; sourced, never run.

# open_device opens /dev/fuse to all, as most systems have it, and says so.
open_device() {
	device_mode=$(stat -c %a /dev/fuse)
	[ "$device_mode" != 666 ] || return 0
	echo "== /dev/fuse is opened to all for this run (it is $device_mode; most systems have 666)"
	chmod 666 /dev/fuse
}

# close_device gives it back the mode that it had, if it was opened.
close_device() { [ -z "${device_mode:-}" ] || chmod "$device_mode" /dev/fuse; }
