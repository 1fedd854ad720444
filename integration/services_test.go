package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"oncefs/integration/rig"
)

// deployed is a file below deploy, from the tree or from where CI put it.
func deployed(t *testing.T, name string) string {
	t.Helper()
	for _, dir := range []string{"../deploy", "deploy"} {
		if b, err := os.ReadFile(filepath.Join(dir, name)); err == nil {
			return string(b)
		}
	}
	t.Fatalf("deploy/%s is not there", name)
	return ""
}

// boot runs a real systemd as process 1 of namespaces of its own, where nothing
// of the machine's units is started: only the driver, a script, and the units that
// it starts. It returns what the driver wrote.
func boot(t *testing.T, d *rig.Dir, units map[string]string, driver string) string {
	t.Helper()
	rig.Root(t)
	rig.Need(t, "unshare", "util-linux")
	rig.Need(t, "systemctl", "systemd")
	systemd := "/lib/systemd/systemd"
	if _, err := os.Stat(systemd); err != nil {
		systemd = "/usr/lib/systemd/systemd"
	}
	dir := filepath.Join(d.Path, "units")
	write := func(name, text string) {
		path := filepath.Join(dir, name)
		os.MkdirAll(filepath.Dir(path), 0o755)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// Default dependencies are the machine's own start.
	const alone = "[Unit]\nDefaultDependencies=no\n"
	for name, text := range units {
		write(name, text)
		write(name+".d/test.conf", alone+fmt.Sprintf("[Service]\nBindPaths=%s\nBindReadOnlyPaths=%s\n", d.Path, filepath.Dir(rig.Binary(t))))
		if strings.Contains(name, "@") { // nothing that gives it a mount namespace
			write(name+".d/test.conf", alone)
		}
	}
	out := filepath.Join(d.Path, "driver.out")
	script := d.Write("driver.sh", []byte(driver+"\nsystemctl --no-block exit 0\n"))
	write("driver.service", alone+fmt.Sprintf("[Service]\nType=oneshot\nExecStart=/bin/bash %s\nStandardOutput=file:%s\nStandardError=file:%s\n", script, out, out))
	write("driver.target", alone+"Requires=driver.service\n")
	setup := fmt.Sprintf(`set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs none /sys/fs/cgroup
mkdir /sys/fs/cgroup/unified /sys/fs/cgroup/systemd
mount -t cgroup -o none,name=systemd,xattr none /sys/fs/cgroup/systemd ||
	mount -t cgroup2 none /sys/fs/cgroup
mount -t tmpfs -o mode=755 none /run
mount --make-rshared /
mkdir -p /run/systemd
cp -r %s /run/systemd/system
exec env -i PATH="$PATH" container=oci %s --system --unit=driver.target --log-target=console --log-level=info --show-status=no`, dir, systemd)
	cmd := exec.Command("unshare", "--mount", "--pid", "--cgroup", "--uts", "--ipc", "--fork", "--kill-child", "bash", "-c", setup)
	r := rig.Exec(t, cmd)
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatalf("%v: %+v", err, r)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("systemd: %+v\ndriver: %s", r, b)
		}
	})
	return string(b)
}

// unit is a unit of deploy/systemd for this machine.
func unit(t *testing.T, d *rig.Dir, name string, more ...string) string {
	t.Helper()
	return strings.NewReplacer(append([]string{"/usr/local/bin/oncefs", rig.Binary(t), "/etc/oncefs/", d.Path + "/"}, more...)...).Replace(deployed(t, "systemd/"+name))
}

func TestDeploy_SystemdMountUnit(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	os.Rename(d.Enc, filepath.Join(d.Path, "daemon.yaml.enc"))
	d.Write("daemon.passphrase", []byte(rig.Passphrase+"\n"))
	out := boot(t, d, map[string]string{"oncefs@.service": unit(t, d, "oncefs@.service")}, `
as() { setpriv --reuid=daemon --regid=daemon --clear-groups "$@" 2>&1; }
systemctl start oncefs@daemon.service; echo "start $?"
systemctl show -p SubState oncefs@daemon.service
as cat /run/oncefs/daemon/daemon.yaml
as cat /run/oncefs/daemon/daemon.yaml
as ls /run/credentials/oncefs@daemon.service/
`+rig.Binary(t)+` status /run/oncefs/daemon; echo "status $?"
systemctl stop oncefs@daemon.service; echo "stop $?"
systemctl show -p Result -p SubState oncefs@daemon.service
grep -c " /run/oncefs/daemon fuse" /proc/self/mounts; ls /run/oncefs`)
	want := regexp.MustCompile(`(?s)^start 0
SubState=running
` + regexp.QuoteMeta(content) + `cat: .*No such file or directory
ls: .*Permission denied
.* memory memfd_secret, sandbox undumpable noprivileges landlock seccomp
.*spent.*
status 91
stop 0
Result=success
SubState=dead
0
$`)
	if !want.MatchString(out) {
		t.Errorf("%s", out)
	}
}

func TestDeploy_SystemdRunUnit(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	d.Write("app.passphrase", []byte(rig.Passphrase+"\n"))
	app := d.Write("app.sh", []byte(`{ cat "$1"; cat "$1"; id -u; grep CapBnd /proc/self/status; touch /usr/x /etc/x "$0"; } >>"$0.out" 2>&1; mv "$0.out" "$0.done"; exec sleep 1000`))
	os.Chmod(app, 0o644)
	os.Chmod(d.Path, 0o777)
	out := boot(t, d, map[string]string{"app.service": unit(t, d, "app.service", "/usr/local/bin/app --config", "/bin/sh "+app, "--user app", "--user daemon")}, `
systemctl start app.service; echo "start $?"
until [ -e `+app+`.done ]; do :; done
cat `+app+`.done
ls -A /run/app
grep -c " /run/app fuse" /proc/self/mounts
mv `+app+`.done `+app+`.first
systemctl kill --kill-whom=main --signal=KILL app.service
until [ -e `+app+`.done ]; do :; done
head -1 `+app+`.done
systemctl show -p NRestarts app.service
systemctl stop app.service; echo "stop $?"
systemctl show -p Result -p SubState app.service
ps -e -o args | grep -c "^oncefs"`)
	want := regexp.MustCompile(`(?s)^start 0
` + regexp.QuoteMeta(content) + `cat: .*No such file or directory
1
CapBnd:	0000000000000000
touch: .*/usr/x.*
touch: .*/etc/x.*
touch: .*
0
user: app
NRestarts=1
stop 0
Result=success
SubState=dead
0
$`)
	if !want.MatchString(out) {
		t.Errorf("%s", out)
	}
}

// systemd's own judgement of the units, without a running systemd.
func TestDeploy_SystemdVerify(t *testing.T) {
	analyze := rig.Need(t, "systemd-analyze", "systemd")
	d := rig.NewDir(t, []byte(content))
	for name, worst := range map[string]float64{"oncefs@daemon.service": 4.5, "app.service": 5.5} {
		source := strings.Replace(name, "@daemon", "@", 1)
		os.Chmod(d.Write(name, []byte(unit(t, d, source, "/usr/local/bin/app ", "/bin/sh "))), 0o644)
		path := filepath.Join(d.Path, name)
		if r := rig.Exec(t, exec.Command(analyze, "verify", "--man=no", path)); r.Code != 0 || strings.Contains(r.Err, name) {
			t.Errorf("%s: %+v", name, r)
		}
		r := rig.Exec(t, exec.Command(analyze, "security", "--offline=yes", path))
		m := regexp.MustCompile(`exposure level for .*: ([0-9.]+)`).FindStringSubmatch(r.Out)
		if m == nil {
			t.Fatalf("%s: %+v", name, r)
		}
		if level, err := strconv.ParseFloat(m[1], 64); err != nil || level > worst {
			t.Errorf("%s: exposure level %s, was %.1f", name, m[1], worst)
		}
	}
}

// The s6 service with the real s6: the one that waits is let go when the mount is
// ready, and what has ended is not started again.
func TestDeploy_S6(t *testing.T) {
	rig.Need(t, "s6-svscan", "s6")
	wait := rig.Need(t, "s6-svwait", "s6")
	d := rig.NewDir(t, []byte(content))
	scan := filepath.Join(d.Path, "services")
	got := filepath.Join(d.Path, "got")
	write := func(name, text string, mode os.FileMode) {
		path := filepath.Join(scan, name)
		os.MkdirAll(filepath.Dir(path), 0o755)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"run", "finish", "notification-fd"} {
		text := strings.Replace(deployed(t, "s6/oncefs/"+name), "oncefs mount /config --enc secrets.yaml.enc",
			fmt.Sprintf("%s mount %s --enc %s --passphrase-file %s", rig.Binary(t), d.Conf, d.Enc, d.Pass), 1)
		write("oncefs/"+name, text, 0o755)
	}
	// The user changes in the deployed one, which takes root.
	app := strings.Replace(deployed(t, "s6/app/run"), "exec s6-setuidgid app /usr/local/bin/app --config /config/secrets.yaml",
		fmt.Sprintf("cat %s >%s; cat %s 2>%s.second; mv %s %s.done; exec sleep 1000", d.Secret(), got, d.Secret(), got, got, got), 1)
	write("app/run", app, 0o755)
	svscan := exec.Command("s6-svscan", scan)
	if err := svscan.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		exec.Command("s6-svscanctl", "-t", scan).Run()
		svscan.Wait()
	})
	rig.WaitFor(t, "the application", func() bool { _, err := os.Stat(got + ".done"); return err == nil })
	if b, _ := os.ReadFile(got + ".done"); string(b) != content {
		t.Errorf("the application got %q", b)
	}
	if b, _ := os.ReadFile(got + ".second"); !strings.Contains(string(b), "No such file") {
		t.Errorf("the second read: %q", b)
	}
	service := filepath.Join(scan, "oncefs")
	if r := rig.Exec(t, exec.Command(wait, "-U", "-t", "60000", service)); r.Code != 0 {
		t.Errorf("ready: %+v", r)
	}
	if r := rig.Exec(t, exec.Command("s6-svc", "-t", service)); r.Code != 0 {
		t.Errorf("%+v", r)
	}
	// Really down, and not wanted up.
	if r := rig.Exec(t, exec.Command(wait, "-D", "-t", "60000", service)); r.Code != 0 {
		t.Errorf("down: %+v", r)
	}
	if r := rig.Exec(t, exec.Command("s6-svstat", "-o", "up,wantedup", service)); strings.TrimSpace(r.Out) != "false false" {
		t.Errorf("s6-svstat: %+v", r)
	}
	if rig.Mounted(t, d.Conf) {
		t.Error("still mounted")
	}
}
