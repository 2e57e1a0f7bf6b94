// A service of Java: PORT. service_client.py has its protocol. Each connection has a thread; garbage is made all the time.
import java.io.*;
import java.net.*;
import java.util.*;
import java.util.concurrent.*;
import java.util.concurrent.atomic.*;

public class Service {
    static final ConcurrentHashMap<String, Long> sums = new ConcurrentHashMap<>();
    static final AtomicLong ticks = new AtomicLong();
    static volatile boolean right = true;

    public static void main(String[] words) throws Exception {
        byte[] memory = new byte[4 << 20];
        new Random(1).nextBytes(memory);
        int wanted = Arrays.hashCode(memory);
        Executors.newScheduledThreadPool(2).scheduleAtFixedRate(() -> {
            if (Arrays.hashCode(memory.clone()) != wanted) right = false;
            ticks.incrementAndGet();
        }, 10, 10, TimeUnit.MILLISECONDS);
        ServerSocket server = new ServerSocket(Integer.parseInt(words[0]));
        while (true) {
            Socket socket = server.accept();
            new Thread(() -> serve(socket)).start();
        }
    }

    static void serve(Socket socket) {
        try (socket) {
            BufferedReader reader = new BufferedReader(new InputStreamReader(socket.getInputStream()));
            OutputStream writer = socket.getOutputStream();
            for (String line; (line = reader.readLine()) != null;) {
                String[] words = line.split(" ");
                long sum = sums.merge(words[0], Long.parseLong(words[1]), Long::sum);
                writer.write((words[0] + " " + sum + " " + ticks.get() + (right ? " right\n" : " wrong\n")).getBytes());
            }
        } catch (IOException gone) {
        }
    }
}
