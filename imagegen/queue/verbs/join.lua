-- Adds a client to those of an unfinished task.
--
-- KEYS    1 record; 2 clients (see joined.lua)
-- ARGV    1 epoch; 2 the client that submitted the task, '' if it is unknown; 3 client; 4 most bytes of names; 5 life in
--         ms
-- result  0 if this epoch of the task is over; 1 if the client was one of its clients; 2 if it was added
local record = redis.pcall('GET', KEYS[1])
local state, epoch = string.match(type(record) == 'string' and record or '', '^%d+ (%l+) %S+ (%d+) ')
if (state ~= 'pending' and state ~= 'processing') or epoch ~= ARGV[1] then return 0 end
local names, name = joined_clients(KEYS[2], epoch, ARGV[2]), ' ' .. ARGV[3]
if find_client(names, ARGV[3]) then return 1 end
if #names + #name > tonumber(ARGV[4]) then name = UNCOUNTED end
if name == UNCOUNTED and find_client(names, '*') then return 1 end
redis.call('SET', KEYS[2], epoch .. names .. name, 'PX', ARGV[5])
return 2
