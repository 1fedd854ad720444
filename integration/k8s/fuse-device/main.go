// Command fuse-device is a device plugin for /dev/fuse and nothing else: the
// cluster tests cannot fetch a real one. It offers the device under a name to as
// many containers as ask.
//
// usage: fuse-device RESOURCE, for example squat.ai/fuse
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	plugin "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

// The kubelet's protocol: https://kubernetes.io/docs/concepts/extend-kubernetes/compute-storage-net/device-plugins/
const socketName = "oncefs-fuse.sock"

// copies is how many containers of a node can have the device at once.
const copies = 500

type server struct {
	plugin.UnimplementedDevicePluginServer
}

func (server) GetDevicePluginOptions(context.Context, *plugin.Empty) (*plugin.DevicePluginOptions, error) {
	return &plugin.DevicePluginOptions{}, nil
}

func (server) ListAndWatch(_ *plugin.Empty, stream plugin.DevicePlugin_ListAndWatchServer) error {
	var all []*plugin.Device
	for i := range copies {
		all = append(all, &plugin.Device{ID: "fuse-" + strconv.Itoa(i), Health: plugin.Healthy})
	}
	if err := stream.Send(&plugin.ListAndWatchResponse{Devices: all}); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

func (server) Allocate(_ context.Context, r *plugin.AllocateRequest) (*plugin.AllocateResponse, error) {
	answer := &plugin.AllocateResponse{}
	for range r.ContainerRequests {
		answer.ContainerResponses = append(answer.ContainerResponses, &plugin.ContainerAllocateResponse{
			Devices: []*plugin.DeviceSpec{{HostPath: "/dev/fuse", ContainerPath: "/dev/fuse", Permissions: "rw"}},
		})
	}
	return answer, nil
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "fuse-device:", err)
		os.Exit(1)
	}
}

// run serves until the kubelet, which starts anew, removes the socket: then it
// wants to be registered with again, and whoever restarts this container does it.
func run(args []string) error {
	if len(args) != 1 {
		return errors.New("usage: fuse-device RESOURCE")
	}
	socket := filepath.Join(plugin.DevicePluginPath, socketName)
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	gone, err := removed(socket)
	if err != nil {
		return err
	}
	s := grpc.NewServer()
	plugin.RegisterDevicePluginServer(s, server{})
	go s.Serve(listener)
	conn, err := grpc.NewClient("unix://"+plugin.KubeletSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = plugin.NewRegistrationClient(conn).Register(context.Background(), &plugin.RegisterRequest{
		Version: plugin.Version, Endpoint: socketName, ResourceName: args[0],
	})
	if err != nil {
		return fmt.Errorf("register: %w", err)
	}
	fmt.Println("registered", args[0])
	return <-gone
}

// removed tells when the file goes.
func removed(path string) (<-chan error, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		return nil, err
	}
	// A socket that is open still has a link less: that changes its attributes.
	if _, err := unix.InotifyAddWatch(fd, path, unix.IN_ATTRIB|unix.IN_DELETE_SELF); err != nil {
		return nil, err
	}
	gone := make(chan error, 1)
	go func() {
		buf := make([]byte, 4096)
		for {
			if _, err := unix.Read(fd, buf); err != nil && err != unix.EINTR {
				gone <- err
				return
			}
			if _, err := os.Lstat(path); err != nil {
				gone <- errors.New("the kubelet has removed the socket: it starts anew")
				return
			}
		}
	}()
	return gone, nil
}
